"""Which layers an export writes, and how wide each block is there.

Layers without any kept unit are dropped. If a runtime or a device needs more units than the decision keeps, the block
is padded with units of the base model whose output columns are zero. The model's outputs do not change, and this holds
for repaired blocks too, whose repaired weights exist only for the kept units. Padding costs as much memory and time as
real units, and is counted as kept. `budget.ffn_multiple` in a recipe searches for real units instead. The other rows of
the padding are those of the base model, so fine-tuning can make use of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import Literal

import torch
from torch import Tensor

from pgprune_cli.core.grid import Grid
from pgprune_cli.errors import UserError
from pgprune_cli.model.families.adapter import Block
from pgprune_cli.model.masks import LayerMask, ModelMask
from pgprune_cli.model.prunable import Shape
from pgprune_cli.model.unit_tensors import KeptElements, UnitTensor, gather, kept_shape
from pgprune_cli.run.layout import DECISION_RECORD


@dataclass(frozen=True)
class ShapeRequirements:
    """What a runtime, a format or the user requires of the shapes beyond what the decision keeps.

    attention: which of the written layers must have at least one KV head; ffn: which must have at least one channel.
    pad_kv_heads, pad_ffn: each block has a multiple of that many KV heads or channels, or all of the base's, or none.
    """

    attention: Literal["any", "first", "every"] = "any"
    ffn: Literal["any", "every"] = "any"
    pad_kv_heads: int = 1
    pad_ffn: int = 1

    def combined(self, other: ShapeRequirements) -> ShapeRequirements:
        """Return the weakest requirements that imply both."""
        return ShapeRequirements(
            max(self.attention, other.attention, key=("any", "first", "every").index),
            max(self.ffn, other.ffn, key=("any", "every").index),
            lcm(self.pad_kv_heads, other.pad_kv_heads),
            lcm(self.pad_ffn, other.pad_ffn),
        )


@dataclass(frozen=True)
class RuntimeShapes:
    """The shapes of an export.

    dense: the shape of the base model; layers: indices of its layers that are written, in order. kept: what the
    decision keeps in *every* layer of the base model. written: what is written of every layer, which is the kept
    elements and the padding (nothing for a layer that is not in `layers`).
    """

    dense: Shape
    layers: tuple[int, ...]
    kept: ModelMask
    written: ModelMask

    @property
    def padded(self) -> bool:
        """True if any block has padding."""
        return self.dense.kept(self.kept) != self.dense.kept(self.written)

    def sizes(self) -> list[dict[str, tuple[int, int]]]:
        """Return how many (groups, members) each block of the written layers has, by block name, layer after layer."""
        sizes = self.dense.kept(self.written)
        return [sizes[layer] for layer in self.layers]

    @property
    def uniform(self) -> bool:
        """True if blocks of the same kind have the same sizes in all written layers, and no block is missing."""
        by_block: dict[Block | None, set[tuple[int, int]]] = {}
        for layer, sizes in zip(self.layers, self.sizes(), strict=True):
            for name, size in sizes.items():
                by_block.setdefault(self.dense.blocks[layer].get(name), set()).add(size)
        return all(len(sizes) == 1 and all(groups for groups, _ in sizes) for sizes in by_block.values())

    @property
    def sparsity(self) -> float:
        """The fraction of the prunable parameters that is not written. Padding counts as kept."""
        parameters = self.dense.parameters
        return 1 - self.dense.cost(parameters, self.written) / self.dense.cost(parameters)


def runtime_shapes(dense: Shape, model_mask: ModelMask, requirements: ShapeRequirements) -> RuntimeShapes:
    """Return the shapes with the least padding that meets the requirements.

    The padding of a block is its first removed elements; which ones they are does not change the logits. A layer
    without query heads gets as few per KV head as any other layer has, so that equal layers remain possible. If every
    layer had a recurrent block, one without any block is written too: transformers counts the tokens in its cache.
    Raises UserError if the decision keeps nothing.
    """
    layers = tuple(i for i, layer in enumerate(model_mask) if layer.attention.any() or layer.ffn.any())
    if not layers:
        raise UserError(
            f"{DECISION_RECORD}: keeps no units, so there is no model to write. Search at a lower sparsity."
        )
    if all(dense.is_recurrent(layer) and model_mask[layer].attention.any() for layer in layers):
        removed = [layer for layer in range(dense.layers) if layer not in layers]
        layers = tuple(sorted((*layers, *removed[:1])))
    written = list(model_mask)
    attention_sizes = [dense.grids["attention"][index].kept(model_mask[index].attention) for index in layers]
    fewest = min((members for _, members in attention_sizes if members), default=1)
    for index in layers:
        needs_head = requirements.attention == "every" or (requirements.attention == "first" and index == layers[0])
        attention, ffn = (dense.grids[name][index] for name in ("attention", "ffn"))
        written[index] = LayerMask(
            _padded(model_mask[index].attention, attention, int(needs_head), fewest, requirements.pad_kv_heads, 1),
            _padded(model_mask[index].ffn, ffn, int(requirements.ffn == "every"), 1, 1, requirements.pad_ffn),
        )
    return RuntimeShapes(dense, layers, model_mask, tuple(written))


def _padded(mask: Tensor, grid: Grid, minimum: int, fewest: int, group_multiple: int, member_multiple: int) -> Tensor:
    """Return a regular mask `(elements,)` with elements added, to at least `minimum` groups.

    Then the numbers of groups and of members per group are multiples, or all of the grid's. A block without elements
    gets groups of `fewest` members.
    """
    groups, members = grid.kept(mask)
    if not max(groups, minimum):
        return mask
    if not groups:
        groups, members = max(minimum, grid.min_groups), min(fewest, grid.members)
    by_group = mask.view(grid.groups, grid.members).clone()
    target = min(-(-groups // group_multiple) * group_multiple, grid.groups)
    kept = by_group.any(1)
    kept[(~kept).nonzero().squeeze(1)[: target - int(kept.sum())]] = True
    width = min(-(-members // member_multiple) * member_multiple, grid.members)
    for group in kept.nonzero().squeeze(1).tolist():
        row = by_group[group]
        row[(~row).nonzero().squeeze(1)[: width - int(row.sum())]] = True
    return by_group.flatten()


def output_columns(dense: Tensor, tensor: UnitTensor, kept: Tensor, written: Tensor, repaired: Tensor | None) -> Tensor:
    """Return the output projection of a block on its written elements, with zeros in the columns of the padding.

    dense: the base model's, as `tensor` describes it; kept, written: masks `(elements,)`, the first within the second;
    repaired: used in place of the dense columns of the kept elements.
    """
    if repaired is None:
        repaired = gather(dense, tensor, KeptElements(kept))
    if torch.equal(kept, written):
        return repaired
    return placed(repaired, repaired.new_zeros(kept_shape(tensor, dense.shape, written)), tensor, kept, written)


def inner_rows(dense: Tensor, tensor: UnitTensor, kept: Tensor, written: Tensor, repaired: Tensor | None) -> Tensor:
    """Return an inner tensor of a block on its written elements. The rows of the padding are those of the base model.

    Arguments as for `output_columns`.
    """
    if repaired is not None and torch.equal(kept, written):
        return repaired
    rows = gather(dense, tensor, KeptElements(written))
    if repaired is None:
        return rows
    return placed(repaired, rows.to(torch.promote_types(rows.dtype, repaired.dtype)), tensor, kept, written)


def placed(repaired: Tensor, rows: Tensor, tensor: UnitTensor, kept: Tensor, written: Tensor) -> Tensor:
    """Return `rows`, which are those of the written elements, with the repaired rows of the kept elements in place."""
    kept_rows, written_rows, repaired = _rows_of(tensor, kept), _rows_of(tensor, written), repaired.to(rows.dtype)
    if not tensor.stacked:
        return rows.index_copy_(tensor.axis, kept_rows[written_rows].nonzero().squeeze(1), repaired)
    sources = iter(repaired)
    groups = written_rows.any(1)
    for target, ours, all_rows in zip(rows, kept_rows[groups], written_rows[groups], strict=True):
        if ours.any():
            target.index_copy_(tensor.axis - 1, ours[all_rows].nonzero().squeeze(1), next(sources))
    return rows


def _rows_of(tensor: UnitTensor, mask: Tensor) -> Tensor:
    """Return which rows of a unit tensor a mask `(elements,)` keeps: `(rows,)` bool, `(groups, rows)` if stacked."""
    if tensor.stacked:
        by_group = mask.view(-1, tensor.parts[0].runs)
        return torch.cat([by_group.repeat_interleave(part.width, 1) for part in tensor.parts], 1)
    return torch.cat([mask.view(part.runs, -1).any(1).repeat_interleave(part.width) for part in tensor.parts])
