"""Tensors whose rows belong to the elements of a block, and how to gather the rows of the elements that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from pgprune_cli.core.grid import Grid


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a tensor: `runs` runs of `width` rows, one run per element or one per group of a block."""

    runs: int
    width: int

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.runs * self.width


@dataclass(frozen=True)
class UnitTensor:
    """A weight or bias whose rows belong to the elements of a block.

    name: its name inside the block's module; axis: the axis along which the rows lie; parts: what they are, in order
    (a fused projection of queries, keys and values has three parts); stacked: True if the first axis holds the groups
    instead, so that `axis` holds the members of each group, and a part has one run per member.
    """

    name: str
    axis: int
    parts: tuple[Part, ...]
    stacked: bool = False

    @property
    def module(self) -> str:
        """Path of the module that holds the tensor, inside the block's module."""
        return self.name.rpartition(".")[0]

    @property
    def key(self) -> str:
        """Name of the tensor inside its own module: `weight` or `bias`."""
        return self.name.rpartition(".")[2]


class KeptElements:
    """The elements that a regular mask keeps, as indices of the runs of any tensor. Each index is made once.

    mask: `(elements,)` bool, on the host.
    """

    def __init__(self, mask: Tensor) -> None:
        self._elements, self._count = mask.nonzero().squeeze(1), len(mask)
        self._indices: dict[tuple[int, torch.device], Tensor] = {}

    @classmethod
    def reordered(cls, order: Tensor) -> KeptElements:
        """Keep all elements, in another order `(elements,)` int64: group after group, so that groups stay together."""
        kept = cls(torch.ones(len(order), dtype=torch.bool))
        kept._elements = order
        return kept

    def runs(self, runs: int, device: torch.device) -> Tensor:
        """Return the kept runs of a part with `runs` runs, int64, in the order of the elements, on a device."""
        key = (runs, device)
        if key not in self._indices:
            index = (self._elements // (self._count // runs)).unique_consecutive()
            self._indices[key] = _sent(index, device)
        return self._indices[key]

    def members(self, groups: int) -> tuple[Tensor, Tensor]:
        """Return the kept groups `(g,)` and the kept members of each of them `(g, m)`, int64, on the host."""
        members = self._count // groups
        kept = (self._elements // members).unique_consecutive()
        return kept, (self._elements % members).view(len(kept), -1)

    def rows_of(self, values: Tensor, tensor: UnitTensor) -> Tensor:
        """Return the kept rows of a weight or bias as a new tensor."""
        return gather(values, tensor, self)


class FirstElements:
    """The first `members` members of each of the first `groups` groups of a grid, whose rows need no gathering.

    The rows of whole groups, and of the members of a single group, are views. Those of some members of several groups,
    of a fused tensor with several parts, or of stacked channels are copied, run by run.
    """

    def __init__(self, grid: Grid, groups: int, members: int) -> None:
        self._grid, self._groups, self._members = grid, groups, members

    def rows_of(self, values: Tensor, tensor: UnitTensor) -> Tensor:
        """Return the kept rows of a weight or bias, a view where they lie side by side."""
        if tensor.stacked:
            return self._stacked(values[: self._groups], tensor)
        if len(tensor.parts) == 1:
            return self._first_runs(values, tensor.axis, tensor.parts[0])
        parts = zip(tensor.parts, values.split([part.rows for part in tensor.parts], tensor.axis), strict=True)
        return torch.cat([self._first_runs(rows, tensor.axis, part) for part, rows in parts], tensor.axis)

    def _first_runs(self, values: Tensor, axis: int, part: Part) -> Tensor:
        members, whole = (1, 1) if part.runs == self._grid.groups else (self._members, self._grid.members)
        if members == whole or self._grid.groups == 1:
            return values.narrow(axis, 0, self._groups * members * part.width)
        by_group = values.movedim(axis, 0).unflatten(0, (self._grid.groups, -1))
        copied: Tensor = by_group[: self._groups, : members * part.width].flatten(0, 1).movedim(0, axis)
        return copied

    def _stacked(self, values: Tensor, tensor: UnitTensor) -> Tensor:
        if self._members == self._grid.members:
            return values
        sizes = [part.rows for part in tensor.parts]
        picked = [
            rows.narrow(tensor.axis, 0, self._members * part.width)
            for part, rows in zip(tensor.parts, values.split(sizes, tensor.axis), strict=True)
        ]
        return torch.cat(picked, tensor.axis)  # contiguous, as kernels for experts need it


def kept_shape(tensor: UnitTensor, shape: Sequence[int], mask: Tensor) -> torch.Size:
    """Return the shape of a unit tensor of `shape` with only the rows that a regular mask `(elements,)` keeps."""
    sizes = list(shape)
    if tensor.stacked:
        groups, members = KeptElements(mask).members(sizes[0])
        sizes[0], sizes[tensor.axis] = len(groups), sum(part.width * members.shape[1] for part in tensor.parts)
    else:
        sizes[tensor.axis] = sum(part.width * int(mask.view(part.runs, -1).any(1).sum()) for part in tensor.parts)
    return torch.Size(sizes)


def gather(values: Tensor, tensor: UnitTensor, kept: KeptElements) -> Tensor:
    """Return the kept rows of a weight or bias as a new tensor. values: the dense tensor, or anything with its rows."""
    if tensor.stacked:
        return _gather_stacked(values, tensor, kept)
    sizes = [part.rows for part in tensor.parts]
    picked = [
        gather_runs(rows, tensor.axis, kept.runs(part.runs, values.device), part.runs)
        for part, rows in zip(tensor.parts, values.split(sizes, tensor.axis), strict=True)
    ]
    return picked[0] if len(picked) == 1 else torch.cat(picked, tensor.axis)


def gather_runs(tensor: Tensor, axis: int, kept: Tensor, runs: int) -> Tensor:
    """Return the kept runs of a tensor whose `axis` holds `runs` runs of equal width.

    kept: indices of runs (int64, ascending) on the tensor's device. The result is a new tensor with
    `len(kept) · width` entries along `axis`.
    """
    width = tensor.shape[axis] // runs
    if width == 1:
        # Rows of the transposed matrix are contiguous: on a CPU that is three times as fast as picking columns.
        picked: Tensor = tensor.movedim(axis, 0).index_select(0, kept).movedim(0, axis)
        return picked
    unflattened = tensor.unflatten(axis, (runs, width))
    gathered: Tensor = unflattened.index_select(axis, kept).flatten(axis, axis + 1)
    return gathered


def _gather_stacked(values: Tensor, tensor: UnitTensor, kept: KeptElements) -> Tensor:
    """Gather from a tensor whose first axis holds the groups: the kept members of every kept group."""
    groups, members = kept.members(values.shape[0])
    starts = [0, *accumulate(part.rows for part in tensor.parts)]
    rows = [
        start + (members[:, :, None] * part.width + torch.arange(part.width)).flatten(1)
        for start, part in zip(starts, tensor.parts, strict=False)
    ]
    index = _sent(torch.cat(rows, 1), values.device)
    chosen = values.index_select(0, _sent(groups, values.device)).movedim(tensor.axis, 1)
    expanded = index.view(*index.shape, *(1,) * (chosen.dim() - 2)).expand(-1, -1, *chosen.shape[2:])
    picked = chosen.gather(1, expanded)
    del chosen  # at most two copies exist at a time
    return picked.movedim(1, tensor.axis).contiguous()


def _sent(index: Tensor, device: torch.device) -> Tensor:
    """Return an index of the host on a device. From pinned memory, the host does not wait for the copy."""
    return (index.pin_memory() if device.type == "cuda" else index).to(device, non_blocking=True)
