"""Surgery: what replaying a decision does to every tensor of the base model. Reads and writes no files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pgprune_cli.errors import UserError
from pgprune_cli.export.shapes import RuntimeShapes, output_columns
from pgprune_cli.model.families.adapter import Block, ModelFamily, gather_units
from pgprune_cli.model.masks import Outputs


@dataclass(frozen=True)
class TensorEdit:
    """One tensor of the export and how to make it.

    name, shape, dtype: of the exported tensor; source: name of the base model's tensor that it is made from; make:
    turns that tensor into this one, except for the dtype.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    source: str
    make: Callable[[Tensor], Tensor]

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

    shapes: of the export; outputs: repaired output projections; tensors: the base model's, on the meta device; dtype:
    of the exported tensors, None to keep the base model's.
    """

    def __init__(
        self,
        family: ModelFamily,
        shapes: RuntimeShapes,
        outputs: Outputs,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.family = family
        self.shapes = shapes
        self.outputs = outputs
        self.tensors = tensors
        self.dtype = dtype
        self.new_biases = {
            block
            for (layer, block), output in outputs.items()
            if output.bias is not None
            and f"{family.layers}.{layer}.{family.block(block).output_path}.bias" not in tensors
        }
        """Names of the blocks that get an output bias which the base model lacks. Every layer gets one, zero where the
        repair fitted none."""

    def edits(self) -> list[TensorEdit]:
        """Return an edit for every tensor of the export, in the order of the base model's tensors."""
        return [edit for name in self.tensors for edit in self._edits_of(name)]

    def _edits_of(self, name: str) -> Iterator[TensorEdit]:
        """Yield the edits that use the base model's tensor `name`: none if it is removed."""
        match = re.fullmatch(re.escape(self.family.layers) + r"\.(\d+)\.(.+)", name)
        if match is None:
            yield self._edit(name, name, self.tensors[name].shape, _unchanged)
        elif (layer := int(match[1])) in self.shapes.layers:
            for block in self.family.blocks:
                path = match[2]
                written = self.shapes.written[layer].of(block.name)
                if path.startswith(block.tensor_prefixes()) and written.any():
                    yield from self._edits_in_block(name, layer, path, block)

    def _edits_in_block(self, name: str, layer: int, path: str, block: Block) -> Iterator[TensorEdit]:
        """Yield the edits of the tensor `name`, found at `path` inside its layer, which belongs to a written block."""
        shape = self.tensors[name].shape
        written = self.shapes.written[layer].of(block.name)
        target = f"{self.family.layers}.{self.shapes.layers.index(layer)}.{path}"
        module, _, kind = path.rpartition(".")
        if module == block.output_path and kind == "bias":  # added to the residual stream, so it belongs to no unit
            yield self._edit(target, name, shape, self._bias(layer, block.name))
        elif module == block.output_path:
            columns = torch.Size((shape[0], _written_size(shape[1], written)))
            yield self._edit(target, name, columns, self._columns(layer, block.name))
            if block.name in self.new_biases:
                yield self._edit(target.removesuffix(kind) + "bias", name, shape[:1], self._bias(layer, block.name))
        elif module in (f"{block.module}.{projection.name}" for projection in block.projections):
            rows = torch.Size((_written_size(shape[0], written), *shape[1:]))
            yield self._edit(target, name, rows, _rows(written))
        else:  # a norm, which all units share
            yield self._edit(target, name, shape, _unchanged)

    def _edit(self, name: str, source: str, shape: torch.Size, make: Callable[[Tensor], Tensor]) -> TensorEdit:
        return TensorEdit(name, shape, self.dtype or self.tensors[source].dtype, source, make)

    def _columns(self, layer: int, block: str) -> Callable[[Tensor], Tensor]:
        """Return what makes the output projection of a block. A repaired one is read only when it is called."""

        def make(dense: Tensor) -> Tensor:
            output = self.outputs.get((layer, block))
            kept, written = (masks[layer].of(block) for masks in (self.shapes.kept, self.shapes.written))
            return output_columns(dense, kept, written, output.weight if output else None)

        return make

    def _bias(self, layer: int, block: str) -> Callable[[Tensor], Tensor]:
        """Return what makes the output bias of a block, from the base model's bias or else its output projection."""

        def make(dense: Tensor) -> Tensor:
            output = self.outputs.get((layer, block))
            if output is not None and output.bias is not None:
                return output.bias
            # A block that is all padding must add nothing, so it drops the base model's bias too.
            keeps_bias = dense.dim() == 1 and bool(self.shapes.kept[layer].of(block).any())
            return dense if keeps_bias else dense.new_zeros(dense.shape[0])

        return make


def _written_size(size: int, written: Tensor) -> int:
    """Return the length of an axis with only the written units; it has length `size` with all of them."""
    return size // len(written) * int(written.sum())


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _rows(written: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda tensor: gather_units(tensor, 0, written.nonzero().squeeze(1), len(written))
