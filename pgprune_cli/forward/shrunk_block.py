"""One block of a layer on its kept elements.

Just before the block runs, the kept rows and columns of its projections take the place of the dense matrices; right
after it, the dense matrices are back. They are gathered into new tensors, so memory grows by the slices of one block.
If the elements lie in the order in which a width search keeps them (element_order.py), a width is a prefix of the
matrices, and its rows are views of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pgprune_cli.core.grid import Grid
from pgprune_cli.forward.uploads import Upload
from pgprune_cli.model.families.adapter import Block, ModelFamily
from pgprune_cli.model.masks import RepairedBlock
from pgprune_cli.model.quantized import Int8Linear, QuantizedLinear, Rows
from pgprune_cli.model.unit_tensors import FirstElements, KeptElements, UnitTensor


def shrunk_block(
    family: ModelFamily, layer: nn.Module, block: Block, mask: Tensor, repaired: RepairedBlock | None
) -> AbstractContextManager[None]:
    """Run one block of a layer on its kept elements inside the `with`: see `ShrinkableBlock.shrunk`."""
    return ShrinkableBlock.of(family, layer, block).shrunk(mask, repaired)


KEPT, REMOVED = b"\x01", b"\x00"
"""An element of a mask in memory."""


@dataclass(frozen=True)
class _Kept:
    """What a mask keeps of a block.

    settings: attributes (module, name, value) of the smaller block; order: in which the elements lie, see `shrunk`.
    """

    elements: KeptElements | FirstElements
    settings: Sequence[tuple[nn.Module, str, Any]]
    order: Tensor | None


@dataclass(frozen=True)
class ShrinkableBlock:
    """A block of a dense layer, with what shrinking it needs to know about it.

    module: the block's; tensors: those with rows of elements, the output's weight last; is_unpacked: whether int8
    weights are unpacked each time it runs; prefixes: by mask, what it keeps in the order that was asked for last. A
    width search asks for the same few widths again and again.
    """

    family: ModelFamily
    layer: nn.Module
    block: Block
    module: nn.Module
    grid: Grid
    tensors: tuple[UnitTensor, ...]
    device: torch.device
    is_unpacked: bool
    prefixes: dict[bytes, _Kept] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, family: ModelFamily, layer: nn.Module, block: Block) -> ShrinkableBlock:
        """Look at a block of a dense layer."""
        module = layer.get_submodule(block.module)
        tensors, grid = family.unit_tensors(layer, block), family.grid(layer, block)
        is_unpacked = any(isinstance(part, Int8Linear) for part in module.modules())
        device = next(module.parameters()).device
        return cls(family, layer, block, module, grid, tensors, device, is_unpacked)

    def shrunk(
        self, mask: Tensor, repaired: RepairedBlock | None, order: Tensor | None = None, upload: Upload | None = None
    ) -> AbstractContextManager[None]:
        """Run the block on its kept elements inside the `with`. Without any, a placeholder runs in its place.

        mask: `(elements,)` bool, regular; repaired: its repaired weights, if there are any; order: the elements
        `(elements,)` int64 in the order in which they lie, ascending by default; upload: if given, brings the repaired
        output projection to the device.
        """
        key = mask.numpy().tobytes()  # tests of a few bytes take less time than operations on tensors
        if KEPT not in key:
            return _replaced(self.layer, self.block.module, self.family.placeholder(self.block))
        # int8 weights are unpacked when they are gathered, outside of what a latency measurement times.
        if repaired is None and not self.is_unpacked and REMOVED not in key:
            return nullcontext()
        kept = self.prefixes.get(key)
        if kept is None or kept.order is not order:
            kept = self._kept(mask, order)
            if isinstance(kept.elements, FirstElements):
                self.prefixes[key] = kept
        return self._on_slices(_Slices(self, kept, repaired, upload))

    def shrink(self, mask: Tensor, repaired: RepairedBlock | None) -> None:
        """Keep only the kept elements for good. mask, repaired: as in `shrunk`."""
        if not mask.any():
            setattr(self.layer, self.block.module, self.family.placeholder(self.block))
        elif repaired is not None or not mask.all():
            _Slices(self, self._kept(mask, None), repaired).put()

    def _kept(self, mask: Tensor, order: Tensor | None) -> _Kept:
        """Return what a regular mask `(elements,)` that keeps something keeps of the block."""
        if order is not None:
            mask = mask[order]
        grid = self.grid
        groups, members = grid.kept(mask)
        is_prefix = order is not None and bool(mask.view(grid.groups, grid.members)[:groups, :members].all())
        elements = FirstElements(grid, groups, members) if is_prefix else KeptElements(mask)
        return _Kept(elements, tuple(self.family.settings(self.layer, self.block, groups, members)), order)

    @contextmanager
    def _on_slices(self, slices: _Slices) -> Iterator[None]:
        # always_call: the dense weights come back even when the forward pass raises.
        handles = [
            self.module.register_forward_pre_hook(lambda *_: slices.put()),
            self.module.register_forward_hook(lambda *_: slices.restore(), always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            slices.restore()


@contextmanager
def _replaced(layer: nn.Module, name: str, placeholder: nn.Module) -> Iterator[None]:
    dense = layer.get_submodule(name)
    setattr(layer, name, placeholder)
    try:
        yield
    finally:
        setattr(layer, name, dense)


class _Slices:
    """Puts the rows of a block's kept elements in place of its dense weights, and takes them out again."""

    def __init__(
        self,
        block: ShrinkableBlock,
        kept: _Kept,
        repaired: RepairedBlock | None,
        upload: Upload | None = None,
    ) -> None:
        self.kept, self.settings = kept.elements, kept.settings
        self.module, self.tensors, self.device = block.module, block.tensors, block.device
        self.refitted = _refitted(block.block, block.tensors[-1].name, repaired)
        self.output, self.upload = block.tensors[-1].name, upload
        self.undo: list[Callable[[], None]] = []

    def put(self) -> None:
        """Put the rows of the kept elements in place of the dense weights."""
        for owner, attribute, value in self.settings:
            self.undo.append(partial(setattr, owner, attribute, getattr(owner, attribute)))
            setattr(owner, attribute, value)
        for tensor in self.tensors:
            if tensor.name not in self.refitted:
                self._put(tensor.name, _kept_values(self.module, tensor, self.kept))
        for name, value in self.refitted.items():
            if self.upload is not None and name == self.output:
                value = self.upload.take()
                self.undo.append(self.upload.release)
            self._put(name, value.to(self.device, _dtype(self.module, name), non_blocking=True))

    def restore(self) -> None:
        """Put the dense weights back."""
        while self.undo:
            self.undo.pop()()

    def _put(self, name: str, value: Tensor | Rows) -> None:
        path, _, key = name.rpartition(".")
        owner = self.module.get_submodule(path)
        if key == "weight" and isinstance(owner, QuantizedLinear):
            self.undo.append(partial(setattr, owner, "kept", None))
            owner.kept = value
            return
        assert isinstance(value, Tensor)
        parameter = getattr(owner, key)
        if parameter is None:  # the repair adds a bias that the dense model does not have
            self.undo.append(partial(setattr, owner, key, None))
            setattr(owner, key, nn.Parameter(value, requires_grad=False))
        else:
            self.undo.append(partial(setattr, parameter, "data", parameter.data))
            parameter.data = value


def _refitted(block: Block, output_weight: str, repaired: RepairedBlock | None) -> Mapping[str, Tensor]:
    """Return the refitted tensors of a block by their names inside its module. output_weight: that of its output's."""
    if repaired is None:
        return {}
    bias = {} if repaired.bias is None else {block.output_bias: repaired.bias}
    return {**repaired.inner, output_weight: repaired.weight, **bias}


def _dtype(module: nn.Module, name: str) -> torch.dtype:
    """Return the dtype that a block computes in with a weight or bias, which it may lack."""
    path, _, key = name.rpartition(".")
    owner = module.get_submodule(path)
    if isinstance(owner, QuantizedLinear):
        return owner.dtype
    parameter: Tensor | None = getattr(owner, key)
    return owner.get_parameter("weight").dtype if parameter is None else parameter.dtype


def _kept_values(module: nn.Module, tensor: UnitTensor, kept: KeptElements | FirstElements) -> Tensor | Rows:
    owner = module.get_submodule(tensor.module)
    if tensor.key == "weight" and isinstance(owner, QuantizedLinear):
        return owner.gathered(tensor, kept)
    return kept.rows_of(owner.get_parameter(tensor.key).data, tensor)
