"""What can be removed, what it costs, and how much may stay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Family:
    """Units of one kind, layer after layer.

    `counts[l]` units in layer l, each of which costs `costs[l]` (an integer; parameters by default).
    """

    name: str
    counts: tuple[int, ...]
    costs: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.counts) != len(self.costs):
            raise ValueError(f"family {self.name}: {len(self.counts)} layers of units, {len(self.costs)} of costs")
        if min(self.counts, default=0) < 0 or any(c <= 0 for c, k in zip(self.costs, self.counts, strict=True) if k):
            raise ValueError(f"family {self.name}: counts must not be negative, and costs must be positive")

    @property
    def size(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True)
class MaskSpace:
    """All units as one flat axis of length n: family after family, within a family layer after layer."""

    families: tuple[Family, ...]

    @property
    def n(self) -> int:
        return sum(family.size for family in self.families)

    @cached_property
    def costs(self) -> Tensor:
        """`(n,)` int64, the cost of every unit."""
        return torch.cat([torch.tensor(f.costs).repeat_interleave(torch.tensor(f.counts)) for f in self.families])

    def slice_of(self, name: str) -> slice:
        """Where the family `name` lies on the flat axis. Raises KeyError."""
        start = 0
        for family in self.families:
            if family.name == name:
                return slice(start, start + family.size)
            start += family.size
        raise KeyError(name)

    def per_layer(self, flat: Tensor, name: str) -> tuple[Tensor, ...]:
        """Views `(counts[l],)` of a flat `(n,)` tensor, one a layer of the family `name`."""
        family = next(f for f in self.families if f.name == name)
        return torch.split(flat[self.slice_of(name)], list(family.counts))

    @cached_property
    def evenness(self) -> Tensor:
        """`(n,)` in (0, 1): a unit's place within its layer. Sorting by it spreads ties evenly over the layers."""
        places = [(torch.arange(count) + 0.5) / max(count, 1) for f in self.families for count in f.counts]
        return torch.cat(places).double()


@dataclass(frozen=True)
class Constraint:
    """The units `start:stop` of the flat axis may keep a cost of `kept` of their `total`."""

    name: str
    start: int
    stop: int
    kept: int
    total: int

    @property
    def units(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Budget:
    """Constraints that cover the flat axis, in order and without overlap."""

    constraints: tuple[Constraint, ...]

    def __iter__(self) -> Iterator[Constraint]:
        return iter(self.constraints)


def budget_of(space: MaskSpace, sparsity: float, scope: str) -> Budget:
    """The budget that removes the fraction `sparsity` of the cost: of every family (`per-family`) or of all (`global`).

    Costs are whole numbers, so the kept cost is the nearest whole number to (1 − sparsity) · total.
    """
    if scope == "per-family":
        spans = [(f.name, space.slice_of(f.name)) for f in space.families]
    elif scope == "global":
        spans = [("all", slice(0, space.n))]
    else:
        raise ValueError(f"scope {scope!r} is neither per-family nor global")
    totals = [int(space.costs[span].sum()) for _, span in spans]
    return Budget(
        tuple(
            Constraint(name, span.start, span.stop, round((1.0 - sparsity) * total), total)
            for (name, span), total in zip(spans, totals, strict=True)
        )
    )
