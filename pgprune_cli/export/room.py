"""Room for padding in an exported model: its layers with the sizes of its dense model, filled up with zeros.

An export of a run is padded with units of the base model. An exported model no longer has them, so units of zeros take
their place. As the output weights of all padding are zero, the model computes the same.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pgprune_cli.core.grid import first_elements
from pgprune_cli.export.dense_model import DenseModel, Shard
from pgprune_cli.export.shapes import placed
from pgprune_cli.model.masks import LayerMask, ModelMask
from pgprune_cli.model.prunable import PrunableModel, Shape, unit_tensors
from pgprune_cli.model.unit_tensors import UnitTensor


def with_room(pruned: DenseModel) -> tuple[DenseModel, ModelMask]:
    """Return a model whose layers have different sizes in layers of one size, and the mask of its own units in them.

    Its own units come first in every block, so that the names of its tensors stay the same.
    """
    from transformers import AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config
    config = copy.deepcopy(pruned.config)
    config.per_layer_config = None
    with torch.device("meta"):
        model = build(config)
    prunable = PrunableModel.of(model)
    model_mask = _own_units(pruned.shape, prunable.shape)
    room = _Room(pruned, prunable.shape, unit_tensors(prunable), model_mask)
    shards = [*map(room.widened, pruned.shards), room.missing(model.state_dict())]
    added = sum(tensor.numel() for shard in shards for tensor in shard.tensors.values())
    added -= sum(tensor.numel() for tensor in pruned.tensors.values())
    roomy = dataclasses.replace(
        pruned,
        config=config,
        shape=prunable.shape,
        unit_tensors=room.unit_tensors,
        shards=tuple(shards),
        prefixes=room.prefixes(shards[-1]),
        room=added,
    )
    return roomy, model_mask


def _own_units(pruned: Shape, dense: Shape) -> ModelMask:
    """Return the mask of a pruned model's units among those of the dense model: the first ones of every block."""

    def mask(name: str, layer: int) -> Tensor:
        own = pruned.grids[name][layer]
        return first_elements(dense.grids[name][layer], own.groups, own.members)

    return tuple(LayerMask(**{name: mask(name, layer) for name in dense.grids}) for layer in range(dense.layers))


@dataclasses.dataclass(frozen=True)
class _Room:
    """How the tensors of a pruned model lie in those of its dense model.

    shape, unit_tensors: of the dense model; model_mask: the pruned model's units in it.
    """

    pruned: DenseModel
    shape: Shape
    unit_tensors: Mapping[str, UnitTensor]
    model_mask: ModelMask

    def widened(self, shard: Shard) -> Shard:
        """Return a shard whose tensors have the dense sizes."""

        @contextmanager
        def opened() -> Iterator[Callable[[str], Tensor]]:
            with shard.open() as stored:
                yield lambda name: self._in_place(name, stored(name))

        meta = {name: self._in_place(name, tensor) for name, tensor in shard.tensors.items()}
        return Shard(meta, opened)

    def missing(self, dense: Mapping[str, Tensor]) -> Shard:
        """Return zeros for the tensors that the pruned model lacks. dense: all tensors, on the meta device."""
        family = self.shape.family
        present = {family.file_piece(name).tensor for name in self.pruned.tensors} | {family.head_weight}
        dtype = self.pruned.tensors[family.embedding_weight].dtype
        meta = {name: tensor.to(dtype) for name, tensor in dense.items() if name not in present}
        return Shard(meta, lambda: nullcontext(lambda name: torch.zeros(meta[name].shape, dtype=dtype)))

    def prefixes(self, missing: Shard) -> dict[str, tuple[str, str]]:
        """Return the prefixes of all names, as a DenseModel has them."""
        own = self.pruned.prefixes
        inside = next((own[name] for name in own if name.startswith(f"{self.shape.family.layers}.")), None)
        return {**own, **({} if inside is None else dict.fromkeys(missing.tensors, inside))}

    def _in_place(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor of the pruned model's files with the dense sizes, zero outside its own units."""
        piece = self.shape.family.file_piece(name)
        unit = self.unit_tensors.get(piece.tensor)
        if unit is None:
            return tensor
        layer, block = self._block_of(piece.tensor)
        mask = self.model_mask[layer].of(block)
        if piece.group is not None and piece.part is not None:  # one expert's matrix
            grid = self.shape.grids[block][layer]
            mask = mask.view(grid.groups, grid.members)[piece.group]
            unit = UnitTensor(unit.name, unit.axis - 1, (unit.parts[piece.part],))
        sizes = list(tensor.shape)
        sizes[unit.axis] = sum(part.rows for part in unit.parts)
        if unit.stacked:
            sizes[0] = len(mask) // unit.parts[0].runs
        zeros = tensor.new_zeros(sizes)
        return zeros if tensor.is_meta else placed(tensor, zeros, unit, mask, torch.ones_like(mask))

    def _block_of(self, name: str) -> tuple[int, str]:
        """Return the layer and the name of the block that a tensor of the dense model belongs to."""
        layer, _, path = name.removeprefix(f"{self.shape.family.layers}.").partition(".")
        blocks = self.shape.blocks[int(layer)].values()
        return int(layer), next(block.name for block in blocks if path.startswith(block.tensor_prefixes()))
