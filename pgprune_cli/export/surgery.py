"""Surgery: what replaying a decision does to every tensor of the base model. Reads and writes no files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pgprune_cli.errors import UserError
from pgprune_cli.export.shapes import RuntimeShapes, inner_rows, output_columns
from pgprune_cli.model.families.adapter import Block, FilePiece
from pgprune_cli.model.masks import RepairedBlocks
from pgprune_cli.model.prunable import Shape
from pgprune_cli.model.unit_tensors import UnitTensor, kept_shape
from pgprune_cli.run.layout import REPAIR_FILE


@dataclass(frozen=True)
class TensorEdit:
    """One tensor of the export and how to make it.

    name, shape, dtype: of the exported tensor; source: name of the base model's tensor that it is made from; make:
    turns that tensor into this one, except for the dtype; rows: if it is made from several tensors, the edits that
    make its rows, in order, in place of `source` and `make`.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    source: str
    make: Callable[[Tensor], Tensor]
    rows: tuple[TensorEdit, ...] = ()

    @property
    def parts(self) -> tuple[TensorEdit, ...]:
        """The edits that make its rows, itself if it is made from one tensor."""
        return self.rows or (self,)

    def apply(self, tensor: Tensor) -> Tensor:
        """Return the exported tensor, made from the base model's tensor `source`.

        Raises UserError for NaN, for infinity, and for values that the dtype cannot hold.
        """
        exact = self.make(tensor)
        result = exact.to(self.dtype).contiguous()
        if not exact.isfinite().all():
            raise UserError(
                f"{self.source}: holds NaN or infinity, in the model's files or in its repair. "
                "Fetch the model's files again."
            )
        if exact.dtype != self.dtype and not result.isfinite().all():
            dtype, largest = str(self.dtype).removeprefix("torch."), torch.finfo(self.dtype).max
            raise UserError(
                f"{self.name}: has weights of up to {float(exact.abs().max()):.4g}, but {dtype} only goes up to "
                f"{largest:.4g}. Export with --dtype bfloat16 or float32."
            )
        return result


class Surgery:
    """Turns the tensors of the base model into those of the export.

    shape: of the base model; unit_tensors: its tensors whose rows belong to elements, by name; shapes: of the export;
    repaired: the repaired blocks; tensors: the base model's, on the meta device; dtype: of the exported tensors,
    None to keep the base model's.
    """

    def __init__(
        self,
        shape: Shape,
        unit_tensors: Mapping[str, UnitTensor],
        shapes: RuntimeShapes,
        repaired: RepairedBlocks,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.family = family = shape.family
        self.unit_tensors = unit_tensors
        self.shapes = shapes
        self.repaired = repaired
        self.tensors = tensors
        self.dtype = dtype
        self.new_biases = {
            block
            for (layer, block), own in repaired.items()
            if own.bias is not None
            and f"{family.layers}.{layer}.{output_bias_path(shape.blocks[layer][block])}" not in tensors
        }
        """Names of the blocks that get an output bias which the base model lacks. Every layer gets one, zero where the
        repair fitted none."""
        _check_names(shape, unit_tensors, repaired)

    def edits(self) -> list[TensorEdit]:
        """Return an edit for every tensor of the export, in the order of the base model's tensors."""
        return [edit for name in self.tensors for edit in self._edits_of(name)]

    def _edits_of(self, name: str) -> Iterator[TensorEdit]:
        """Yield the edits that use the base model's tensor `name`: none if it is removed."""
        piece = self.family.file_piece(name)
        match = re.fullmatch(re.escape(self.family.layers) + r"\.(\d+)\.(.+)", piece.tensor)
        if match is None:
            yield self._edit(name, name, self.tensors[name].shape, _unchanged)
        elif (layer := int(match[1])) in self.shapes.layers:
            for block in self.shapes.dense.blocks[layer].values():
                path = match[2]
                written = self.shapes.written[layer].of(block.name)
                if path.startswith(block.tensor_prefixes()) and written.any():
                    if piece.group is None:
                        yield from self._edits_in_block(name, layer, path, block, piece)
                    else:
                        yield from self._edits_of_expert(name, layer, block, piece)

    def _edits_of_expert(self, name: str, layer: int, block: Block, piece: FilePiece) -> Iterator[TensorEdit]:
        """Yield the edit of a matrix of one expert, none if the expert is removed."""
        assert piece.group is not None and piece.part is not None
        grid, tensor = self.shapes.dense.grids[block.name][layer], self.unit_tensors[piece.tensor]
        written, kept = (
            masks[layer].of(block.name).view(grid.groups, grid.members)
            for masks in (self.shapes.written, self.shapes.kept)
        )
        if not written[piece.group].any():
            return
        own = UnitTensor(tensor.name, tensor.axis - 1, (tensor.parts[piece.part],))
        target = piece.template.format(
            layer=self.shapes.layers.index(layer), group=int(written[: piece.group].any(1).sum())
        )
        shape = kept_shape(own, self.tensors[name].shape, written[piece.group])
        row = int(kept[: piece.group].any(1).sum())
        if piece.tensor.endswith(self.family.output_weights(block)):
            make = self._expert_columns((layer, block.name), own, kept[piece.group], written[piece.group], row)
        else:
            make = self._expert_rows((layer, block.name), own, kept[piece.group], written[piece.group], row, piece.part)
        yield self._edit(target, name, shape, make)

    def _expert_columns(
        self, key: tuple[int, str], tensor: UnitTensor, kept: Tensor, written: Tensor, row: int
    ) -> Callable[[Tensor], Tensor]:
        """Return what makes the output projection of one expert, which is `row` of the repaired ones."""

        def make(dense: Tensor) -> Tensor:
            repaired = self.repaired.get(key) if kept.any() else None
            return output_columns(dense, tensor, kept, written, repaired.weight[row] if repaired else None)

        return make

    def _expert_rows(
        self, key: tuple[int, str], tensor: UnitTensor, kept: Tensor, written: Tensor, row: int, part: int
    ) -> Callable[[Tensor], Tensor]:
        """Return what makes a part of an inner tensor of one expert, which is `row` of the repaired ones."""

        def make(dense: Tensor) -> Tensor:
            repaired = self._inner(key, tensor.name) if kept.any() else None
            if repaired is not None:
                repaired = repaired[row].split(int(kept.sum()) * tensor.parts[0].width, tensor.axis)[part]
            return inner_rows(dense, tensor, kept, written, repaired)

        return make

    def _edits_in_block(self, name: str, layer: int, path: str, block: Block, piece: FilePiece) -> Iterator[TensorEdit]:
        """Yield the edits of the tensor `name`, found at `path` inside its layer, which belongs to a written block."""
        shape = self.tensors[name].shape
        written = self.shapes.written[layer].of(block.name)
        target = piece.template.format(layer=self.shapes.layers.index(layer))
        bias_path, unit_tensor = output_bias_path(block), self.unit_tensors.get(piece.tensor)
        if path == bias_path and unit_tensor is None:  # added to the residual stream, so it belongs to no element
            yield self._edit(target, name, shape, self._bias(layer, block.name))
        elif unit_tensor is None:  # a norm, which all elements share
            yield self._edit(target, name, shape, _unchanged)
        elif path in self.family.output_weights(block):
            columns = kept_shape(unit_tensor, shape, written)
            yield self._edit(target, name, columns, self._columns(layer, block.name, unit_tensor))
            if block.name in self.new_biases and name.removesuffix(path) + bias_path not in self.tensors:
                bias = target.removesuffix(path) + bias_path
                yield self._edit(bias, name, shape[:1], self._bias(layer, block.name))
        else:
            make = self._rows(layer, block.name, unit_tensor)
            yield self._edit(target, name, kept_shape(unit_tensor, shape, written), make)

    def _edit(self, name: str, source: str, shape: torch.Size, make: Callable[[Tensor], Tensor]) -> TensorEdit:
        return TensorEdit(name, shape, self.dtype or self.tensors[source].dtype, source, make)

    def _columns(self, layer: int, block: str, tensor: UnitTensor) -> Callable[[Tensor], Tensor]:
        """Return what makes the output projection of a block. A repaired one is read only when it is called."""

        def make(dense: Tensor) -> Tensor:
            repaired = self.repaired.get((layer, block))
            kept, written = (masks[layer].of(block) for masks in (self.shapes.kept, self.shapes.written))
            return output_columns(dense, tensor, kept, written, repaired.weight if repaired else None)

        return make

    def _rows(self, layer: int, block: str, tensor: UnitTensor) -> Callable[[Tensor], Tensor]:
        """Return what makes an inner tensor of a block. A repaired one is read only when it is called."""

        def make(dense: Tensor) -> Tensor:
            kept, written = (masks[layer].of(block) for masks in (self.shapes.kept, self.shapes.written))
            return inner_rows(dense, tensor, kept, written, self._inner((layer, block), tensor.name))

        return make

    def _inner(self, key: tuple[int, str], name: str) -> Tensor | None:
        """Return the repaired rows of an inner tensor of a block, if it was refitted."""
        repaired = self.repaired.get(key)
        return None if repaired is None else repaired.inner.get(name)

    def _bias(self, layer: int, block: str) -> Callable[[Tensor], Tensor]:
        """Return what makes the output bias of a block, from the base model's bias or else its output projection."""

        def make(dense: Tensor) -> Tensor:
            repaired = self.repaired.get((layer, block))
            if repaired is not None and repaired.bias is not None:
                return repaired.bias
            # A block that is all padding must add nothing, so it drops the base model's bias too.
            keeps_bias = dense.dim() == 1 and bool(self.shapes.kept[layer].of(block).any())
            return dense if keeps_bias else dense.new_zeros(dense.shape[0])

        return make


def _check_names(shape: Shape, unit_tensors: Mapping[str, UnitTensor], repaired: RepairedBlocks) -> None:
    """Raise UserError if the repair refits a tensor that the base model does not have."""
    for (layer, block), own in repaired.items():
        module = f"{shape.family.layers}.{layer}.{shape.blocks[layer][block].module}"
        for name in own.inner:
            if f"{module}.{name}" not in unit_tensors:
                raise UserError(
                    f"{REPAIR_FILE}: refits {module}.{name}, which the base model does not have. Search again."
                )


def output_bias_path(block: Block) -> str:
    """Return the path, inside a layer, of the bias of a block's output."""
    return f"{block.module}.{block.output_bias}"


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
