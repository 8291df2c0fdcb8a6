"""From any θ to one that meets the budget, and from θ to a mask that does."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pgprune_cli.core.space import Budget, MaskSpace

PASSES = 200
"""At most, every third of them a bisection; ten are many, and 66 halvings leave no float64 between the bounds."""
FAR = 1e3
"""A spread of what is projected from which on its greatest entries cost the others digits."""


def project(theta: Tensor, space: MaskSpace, budget: Budget) -> Tensor:
    """The nearest point of {0 ≤ θ ≤ 1, Σ cost·θ = kept for every constraint}, exactly. `(n,)` → `(n,)` float64.

    Distance is Σ cost·(x − θ)², everything that is counted counting once: with equal costs it is the Euclidean
    projection of the paper, and with unequal ones a dear unit is not moved further than a cheap one merely for being
    dear. The budget's limits on widths are no matter of θ, only of the masks it ends in.
    """
    projected = torch.empty_like(theta, dtype=torch.float64)
    for constraint in budget:
        units, nothing = constraint.units, torch.zeros(constraint.stop - constraint.start, dtype=torch.float64)
        projected[units] = project_onto(theta[units].double(), space.costs[units].double(), constraint.kept, nothing)
    return projected


def project_onto(wanted: Tensor, weight: Tensor, kept: int, low: Tensor) -> Tensor:
    """argmin Σ weight·(x − wanted)² over {low ≤ x ≤ 1, Σ weight·x = kept}, all `(m,)` float64.

    KKT: x = clip(wanted − ν, low, 1) for one ν. Σ weight·x falls piecewise linearly in ν, so that Newton's method, kept
    between bounds, ends on the root's own piece, and there it is exact. It begins at ν = 0, the root where `wanted` has
    hardly moved, and takes a few passes where sorting the bends would take twenty. A `kept` out of reach gives the
    nearest that is in reach: all entries at `low`, or all at 1.
    """
    total = weight.sum()
    if kept <= (weight * low).sum():
        return low.clone()
    if kept >= total:
        return torch.ones_like(wanted)
    if wanted.max() - wanted.min() > FAR:
        wanted = _near(wanted, weight, kept, low)
    ones = torch.ones_like(low)
    least, greatest = float((wanted - 1.0).min()), float((wanted - low).max())
    nu = min(max(0.0, least), greatest)
    for number in range(PASSES):
        moved = (wanted - nu).clamp(low, ones)
        excess = float(weight @ moved) - kept
        if excess == 0.0:
            break
        least, greatest = (nu, greatest) if excess > 0 else (least, nu)
        slope = float(weight[(moved > low) & (moved < 1.0)].sum())
        following = nu + excess / slope if slope > 0 else math.nan
        # Newton alone might creep from piece to piece; and where two pieces meet, go from one to the other for ever.
        if number % 3 == 2 or not least < following < greatest:
            following = (least + greatest) / 2
        if not least < following < greatest:
            break
        nu = following
    return (wanted - nu).clamp(low, ones)


def _near(wanted: Tensor, weight: Tensor, kept: int, low: Tensor) -> Tensor:
    """`wanted`, moved so that the root is within [−1, 0], and cut off where an entry is at a bound in any case.

    The greatest entries that together could have what is kept end with a pivot, and ν is in [pivot − 1, pivot]. Without
    the entries further than 2 from it none, however far, costs the others their digits.
    """
    falling = wanted.argsort(descending=True)
    could = (weight * (1.0 - low))[falling].cumsum(0)
    pivot = wanted[falling][torch.searchsorted(could, kept - (weight * low).sum()).clamp_max(len(wanted) - 1)]
    return (wanted - pivot).clamp(-2.0, 2.0)


def hard_mask(theta: Tensor, space: MaskSpace, budget: Budget) -> Tensor:
    """The units of highest θ that fit each constraint and keep to its limits: `(n,)` bool, True = kept.

    Within a layer the units, by falling θ, stand in bundles of the budget's multiple, the last one perhaps smaller; a
    layer keeps its first bundles. Those of the least width stay in any case, then bundles by falling mean θ, one that
    does not fit being passed over and with it the rest of its layer. So a mask is never above the budget, and no
    further bundle would still fit. Without limits a bundle is a unit: with equal costs exactly ⌊kept / cost⌋ units
    stay, whatever ties there are. Ties fall evenly over the layers (a threshold `θ ≥ t` would keep all of them).

    Raises ValueError where the least widths are above the budget.
    """
    bundles = bundled(theta, space, budget)
    return mask_of(bundles, bundles.mean, space, budget)


def mask_of(bundles: Bundles, value: Tensor, space: MaskSpace, budget: Budget) -> Tensor:
    """The mask of units in `bundles` of this budget, by falling `value` `(b,)` in place of the bundles' own means.

    Within a layer the values must fall as the means do. A search that only moves whole layers sorts its units once.
    Raises ValueError as `hard_mask` does.
    """
    least, multiples = budget.limits(space)
    pair, number, cost, order = bundles.pair, bundles.number, bundles.cost, _order(bundles, value)
    kept = number * multiples[pair] < least[pair]
    refused = torch.zeros_like(kept)
    for constraint in budget:
        inside = (bundles.begin >= constraint.start) & (bundles.begin < constraint.stop)
        room = constraint.kept - int(cost[inside & kept].sum())
        if room < 0:
            raise ValueError(f"{constraint.name}: the least widths cost {-room} more than the {constraint.kept} kept")
        left = order[(inside & ~kept)[order]]
        while len(left):
            refused[left[cost[left] > room]] = True
            # A smaller bundle at the end of a layer may fit where the one above it does not; it goes with that one.
            left = left[~refused[left] & ((number[left] == 0) | ~refused[left - 1])]
            spent = cost[left].cumsum(0)
            taken = int(torch.searchsorted(spent, room, right=True))
            kept[left[:taken]] = True
            room -= int(spent[:taken][-1:].sum())
            left = left[taken:]
    return kept.index_select(0, bundles.of)


class Bundles(NamedTuple):
    """The bundles of every (family, layer), numbered one layer after the other, within a layer by falling θ.

    of: `(n,)` the bundle that every unit is in, equal ones of a layer by their places. And of every bundle, `(b,)`: its
    (family, layer); its number there, from 0; how many units the bundles before it hold; its cost, all int64; mean: of
    its θ, float64; evenness: of its units' places in their layers, float64.
    """

    of: Tensor
    pair: Tensor
    number: Tensor
    begin: Tensor
    cost: Tensor
    mean: Tensor
    evenness: Tensor


def bundled(theta: Tensor, space: MaskSpace, budget: Budget) -> Bundles:
    """The units `(n,)` in bundles of the budget's multiples."""
    multiples = budget.limits(space)[1]
    units = theta.argsort(descending=True, stable=True)
    units = units[space.pair_of[units].argsort(stable=True)]
    place = torch.arange(space.n) - space.pair_starts[space.pair_of]
    counts = -(-space.pair_counts // multiples)
    first = counts.cumsum(0) - counts
    at = first[space.pair_of] + place // multiples[space.pair_of]

    pair = torch.arange(len(counts)).repeat_interleave(counts)
    number = torch.arange(len(pair)) - first[pair]
    begin = space.pair_starts[pair] + number * multiples[pair]
    size = at.bincount(minlength=len(pair))
    ranked = theta[units].double()
    # A mean is rounded; between the least and the greatest θ it is exact where they are equal, and ties stay ties.
    mean = (_summed(ranked, at, len(size)) / size).clamp(ranked[begin + size - 1], ranked[begin])
    evenness = _summed(space.evenness[units], at, len(size)) / size
    of = torch.empty_like(at)
    of[units] = at
    return Bundles(of, pair, number, begin, size * space.pair_costs[pair], mean, evenness)


def _order(bundles: Bundles, value: Tensor) -> Tensor:
    """The bundles by falling value `(b,)`, ties by their places in their layers."""
    order = bundles.evenness.argsort(stable=True)
    order = order[value[order].argsort(descending=True, stable=True)]
    # And a layer's bundles keep their order, even where θ that differ by a rounding error have one mean.
    order[bundles.pair[order].argsort(stable=True)] = torch.arange(len(order))
    return order


def _summed(values: Tensor, index: Tensor, length: int) -> Tensor:
    return torch.zeros(length, dtype=values.dtype).index_add_(0, index, values)


def coarser(budget: Budget, space: MaskSpace, multiples: Tensor) -> Budget:
    """The same budget with widths in `multiples` `(J,)` instead of its own.

    For a search on a coarser grid than its result's: least widths are rounded down to it, for up might not fit.
    """
    least = budget.limits(space)[0] // multiples * multiples
    return replace(budget, least=tuple(least.tolist()), multiples=tuple(multiples.tolist()))
