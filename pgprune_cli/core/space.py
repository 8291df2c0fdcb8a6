"""The units that can be removed, their costs, and the budget for the kept ones."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pgprune_cli.core.families import BLOCKS_OF as BLOCKS_OF
from pgprune_cli.core.families import WHOLE_FAMILIES as WHOLE_FAMILIES


@dataclass(frozen=True)
class Family:
    """Units of one kind in all layers.

    counts: the number of units in each layer; costs: what the units of each layer cost, integers in the measure of the
    budget: one for all units of the layer, or one for each of them.
    """

    name: str
    counts: tuple[int, ...]
    costs: tuple[int | tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.counts) != len(self.costs):
            raise ValueError(f"family {self.name}: {len(self.counts)} layers of units, {len(self.costs)} of costs")
        for count, cost in zip(self.counts, self.costs, strict=True):
            if isinstance(cost, tuple) and len(cost) != count:
                raise ValueError(f"family {self.name}: {count} units in a layer, {len(cost)} costs")
            if count < 0 or (count and min(cost if isinstance(cost, tuple) else (cost,)) <= 0):
                raise ValueError(f"family {self.name}: counts must not be negative, and costs must be positive")

    def layer_costs(self, layer: int) -> Tensor:
        """Return the costs of the units of a layer, `(units,)` int64."""
        cost = self.costs[layer]
        return torch.tensor(cost) if isinstance(cost, tuple) else torch.full((self.counts[layer],), cost)

    @property
    def size(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True)
class MaskSpace:
    """All units on one flat axis of length n: family after family, within a family layer after layer.

    Properties of a layer's units as a whole lie on the axis of the J (family, layer) *pairs*, in the same order.
    """

    families: tuple[Family, ...]

    @property
    def n(self) -> int:
        return sum(family.size for family in self.families)

    @cached_property
    def costs(self) -> Tensor:
        """The cost of every unit, `(n,)` int64."""
        costs = [family.layer_costs(layer) for family in self.families for layer in range(len(family.counts))]
        return torch.cat(costs).long() if costs else torch.zeros(0, dtype=torch.int64)

    @cached_property
    def pair_counts(self) -> Tensor:
        """The number of units of every pair, `(J,)` int64."""
        return torch.tensor([count for family in self.families for count in family.counts], dtype=torch.int64)

    @cached_property
    def pair_starts(self) -> Tensor:
        """Where the units of every pair begin on the flat axis, `(J,)` int64."""
        return self.pair_counts.cumsum(0) - self.pair_counts

    @cached_property
    def pair_of(self) -> Tensor:
        """The pair of every unit, `(n,)` int64."""
        return torch.arange(len(self.pair_counts)).repeat_interleave(self.pair_counts)

    @cached_property
    def family_of_pair(self) -> Tensor:
        """The family of every pair, `(J,)` int64."""
        return torch.arange(len(self.families)).repeat_interleave(torch.tensor([len(f.counts) for f in self.families]))

    def slice_of(self, name: str) -> slice:
        """Return the place of the family `name` on the flat axis. Raises KeyError."""
        start = 0
        for family in self.families:
            if family.name == name:
                return slice(start, start + family.size)
            start += family.size
        raise KeyError(name)

    def per_layer(self, flat: Tensor, name: str) -> tuple[Tensor, ...]:
        """Return the parts of a flat `(n,)` tensor that belong to the layers of the family `name`, as views."""
        family = next(f for f in self.families if f.name == name)
        return torch.split(flat[self.slice_of(name)], list(family.counts))

    def widths(self, mask: Tensor) -> dict[str, list[int]]:
        """Return the number of units that a mask `(n,)` bool keeps in each layer, by family."""
        return {f.name: [int(part.sum()) for part in self.per_layer(mask, f.name)] for f in self.families}

    @cached_property
    def evenness(self) -> Tensor:
        """Every unit's place within its layer, `(n,)` in (0, 1). Sorting by it spreads ties evenly over the layers."""
        places = [(torch.arange(count) + 0.5) / max(count, 1) for f in self.families for count in f.counts]
        return torch.cat(places).double()


@dataclass(frozen=True)
class Constraint:
    """The kept units among `start:stop` of the flat axis, which cost `total` together, cost at most `kept`."""

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
    """Constraints on the kept cost that cover the flat axis in order, without overlap and without splitting a layer.

    Every (family, layer) also has limits: it keeps at least `min_widths[j]` units, and their number is a multiple of
    `multiples[j]`, or all of them. Without limits both are empty.
    """

    constraints: tuple[Constraint, ...]
    min_widths: tuple[int, ...] = ()
    multiples: tuple[int, ...] = ()

    def __iter__(self) -> Iterator[Constraint]:
        return iter(self.constraints)

    def limits(self, space: MaskSpace) -> tuple[Tensor, Tensor]:
        """Return the minimum width and the multiple of every pair, `(J,)` int64 each.

        A minimum width is rounded up from `min_widths` to a width that the multiples allow.
        """
        counts = space.pair_counts
        least = torch.tensor(self.min_widths, dtype=torch.int64) if self.min_widths else torch.zeros_like(counts)
        multiples = torch.tensor(self.multiples, dtype=torch.int64) if self.multiples else torch.ones_like(counts)
        return (-(-least // multiples) * multiples).minimum(counts), multiples

    def needed(self, space: MaskSpace) -> tuple[int, ...]:
        """Return the cost of the minimum widths, by constraint. A constraint that keeps less cannot be met.

        The units that a minimum width keeps are the first of their layer: where their costs differ, widths are nested.
        """
        place = torch.arange(space.n) - space.pair_starts[space.pair_of]
        bound = space.costs * (place < self.limits(space)[0][space.pair_of])
        return tuple(int(bound[constraint.units].sum()) for constraint in self.constraints)


_NO_MULTIPLES: Mapping[str, int | Sequence[int]] = {}


def budget_of(
    space: MaskSpace,
    sparsity: float,
    scope: str,
    min_keep: float = 0.0,
    multiples: Mapping[str, int | Sequence[int]] = _NO_MULTIPLES,
    whole_layers: Collection[int] = (),
) -> Budget:
    """Return the budget that removes the fraction `sparsity` of the cost.

    Costs are whole numbers, so the kept cost is (1 − sparsity) · total, rounded. Call `Budget.needed` to see whether
    the limits fit. Raises ValueError for an unknown scope.

    Args:
        scope: the fraction applies to every family (`per-family`), to every layer of every family (`per-layer`), or to
            all units together (`global`).
        min_keep: the least fraction of units that every layer of every family keeps, rounded up.
        multiples: by family name, what its widths are multiples of: in all layers, or layer by layer.
        whole_layers: layers in which nothing is removed.
    """
    if scope == "per-family":
        spans = [(f.name, space.slice_of(f.name)) for f in space.families]
    elif scope == "global":
        spans = [("all", slice(0, space.n))]
    elif scope == "per-layer":
        spans = list(_spans_of_layers(space))
    else:
        raise ValueError(f"scope {scope!r}: expected per-family, global or per-layer")
    totals = [int(space.costs[span].sum()) for _, span in spans]
    constraints = tuple(
        Constraint(name, span.start, span.stop, round((1.0 - sparsity) * total), total)
        for (name, span), total in zip(spans, totals, strict=True)
    )
    # In float64, 0.07 · 100 is a little more than 7. It means 7.
    least = [
        count if layer in whole_layers else math.ceil(min_keep * count - 1e-9)
        for family in space.families
        for layer, count in enumerate(family.counts)
    ]
    widths: list[int] = []
    for family in space.families:
        multiple = multiples.get(family.name, 1)
        widths += [multiple] * len(family.counts) if isinstance(multiple, int) else multiple
    return Budget(constraints, tuple(least), tuple(widths))


def _spans_of_layers(space: MaskSpace) -> Iterator[tuple[str, slice]]:
    names = [f"{family.name} of layer {layer}" for family in space.families for layer in range(len(family.counts))]
    for name, start, count in zip(names, space.pair_starts.tolist(), space.pair_counts.tolist(), strict=True):
        yield name, slice(start, start + count)
