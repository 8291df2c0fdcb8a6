"""What a normal form does to a base model: the fate of every tensor. Touches no file."""

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
class Cut:
    """One tensor of the result: its name, shape and dtype, the tensor of the base that it is made of, and how."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    source: str
    make: Callable[[Tensor], Tensor]

    def apply(self, tensor: Tensor) -> Tensor:
        """The result of the base's tensor `source`. Raises UserError where the dtype cannot hold it, or nothing can."""
        made = self.make(tensor)
        result = made.to(self.dtype).contiguous()
        if not made.isfinite().all():
            raise UserError(
                f"{self.source}: holds NaN or infinity in the base's files, or its repair; fetch them again"
            )
        if made.dtype != self.dtype and not result.isfinite().all():
            short, limit = str(self.dtype).removeprefix("torch."), torch.finfo(self.dtype).max
            raise UserError(
                f"{self.name}: has weights of up to {float(made.abs().max()):.4g}, and {short} ends at {limit:.4g}; "
                "export with --dtype float32 or bfloat16"
            )
        return result


class Surgery:
    """Where every tensor of the base goes.

    outputs: the repaired ones; tensors: the base's, on the meta device; dtype: of the result, None: as in the base.
    """

    def __init__(
        self,
        family: ModelFamily,
        form: RuntimeShapes,
        outputs: Outputs,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.family = family
        self.form = form
        self.outputs = outputs
        self.tensors = tensors
        self.dtype = dtype
        self.new_biases = {
            name
            for (index, name), output in outputs.items()
            if output.bias is not None
            and f"{family.layers}.{index}.{family.block(name).output_path}.bias" not in tensors
        }
        """The blocks whose output has a bias in the result and not in the base: in all layers, zeros where unfitted."""

    def cuts(self) -> list[Cut]:
        """Every tensor of the result, in the order of the base."""
        return [cut for name in self.tensors for cut in self._cuts_of(name)]

    def _cuts_of(self, name: str) -> Iterator[Cut]:
        """What is made of the base's tensor `name`: nothing where it is left out."""
        match = re.fullmatch(re.escape(self.family.layers) + r"\.(\d+)\.(.+)", name)
        if match is None:
            yield self._cut(name, name, self.tensors[name].shape, _whole)
        elif (index := int(match[1])) in self.form.layers:
            for block in self.family.blocks:
                inner = match[2]
                written = self.form.written[index].of(block.name)
                if inner.startswith(block.tensor_prefixes()) and written.any():
                    yield from self._cuts_of_block(name, index, inner, block)

    def _cuts_of_block(self, name: str, index: int, inner: str, block: Block) -> Iterator[Cut]:
        """What is made of the tensor `name`, which layer `index` calls `inner`, of one of its blocks that stay."""
        shape = self.tensors[name].shape
        written = self.form.written[index].of(block.name)
        target = f"{self.family.layers}.{self.form.layers.index(index)}.{inner}"
        module, _, kind = inner.rpartition(".")
        if module == block.output_path and kind == "bias":  # onto the residual stream: it belongs to no unit
            yield self._cut(target, name, shape, self._bias(index, block.name))
        elif module == block.output_path:
            columns = torch.Size((shape[0], _part(shape[1], written)))
            yield self._cut(target, name, columns, self._columns(index, block.name))
            if block.name in self.new_biases:
                yield self._cut(target.removesuffix(kind) + "bias", name, shape[:1], self._bias(index, block.name))
        elif module in (f"{block.module}.{projection.name}" for projection in block.projections):
            yield self._cut(target, name, torch.Size((_part(shape[0], written), *shape[1:])), _rows(written))
        else:  # a norm, which all units share
            yield self._cut(target, name, shape, _whole)

    def _cut(self, name: str, source: str, shape: torch.Size, make: Callable[[Tensor], Tensor]) -> Cut:
        return Cut(name, shape, self.dtype or self.tensors[source].dtype, source, make)

    def _columns(self, index: int, block: str) -> Callable[[Tensor], Tensor]:
        """The output projection of a block; a repaired one is read when it is wanted, not now."""

        def make(dense: Tensor) -> Tensor:
            output = self.outputs.get((index, block))
            kept, written = (masks[index].of(block) for masks in (self.form.kept, self.form.written))
            return output_columns(dense, kept, written, output.weight if output else None)

        return make

    def _bias(self, index: int, block: str) -> Callable[[Tensor], Tensor]:
        """The output's bias, of the base's or, where that has none, of the projection's weight."""

        def make(dense: Tensor) -> Tensor:
            output = self.outputs.get((index, block))
            if output is not None and output.bias is not None:
                return output.bias
            # Of a block that is nothing but padding nothing is added, the base's bias neither.
            stays = dense.dim() == 1 and bool(self.form.kept[index].of(block).any())
            return dense if stays else dense.new_zeros(dense.shape[0])

        return make


def _part(size: int, mask: Tensor) -> int:
    """What is left of an axis of `size` along which the units of `mask` lie."""
    return size // len(mask) * int(mask.sum())


def _whole(tensor: Tensor) -> Tensor:
    return tensor


def _rows(mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda tensor: gather_units(tensor, 0, mask.nonzero().squeeze(1), len(mask))
