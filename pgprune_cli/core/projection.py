"""Project θ onto the budget, and turn θ into a mask that meets it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pgprune_cli.core.space import Budget, MaskSpace

PASSES = 200
"""Limit on passes. Usually fewer than ten suffice; every third is a bisection, and 66 of those exhaust float64."""
FAR = 1e3
"""If the values to project spread further than this, the largest would cost the others their digits."""


def project(theta: Tensor, space: MaskSpace, budget: Budget) -> Tensor:
    """Return the exact nearest point of {0 ≤ θ ≤ 1, Σ cost·θ = kept for every constraint}: `(n,)` → `(n,)` float64.

    The distance is Σ cost·(x − θ)². With equal costs this is the Euclidean projection of the paper (Gao et al., 2025);
    with unequal ones, a costly unit is not moved further than a cheap one just because it is costly. θ is 1
    in layers that keep all units; apart from that, the budget's limits on widths only constrain the masks made from θ.
    """
    projected = torch.empty_like(theta, dtype=torch.float64)
    kept_whole = budget.limits(space)[0] == space.pair_counts
    low = kept_whole[space.pair_of].double()
    for constraint in budget:
        units = constraint.units
        projected[units] = project_onto(theta[units].double(), space.costs[units].double(), constraint.kept, low[units])
    return projected


def project_onto(target: Tensor, weight: Tensor, kept: int, low: Tensor) -> Tensor:
    """Return argmin Σ weight·(x − target)² over {low ≤ x ≤ 1, Σ weight·x = kept}.

    target, weight, low and the result: `(m,)` float64.

    KKT: x = clip(target − ν, low, 1) for a single ν. Σ weight·x falls piecewise linearly in ν, so Newton's method,
    bracketed, ends on the piece that holds the root and is exact there. It starts at ν = 0, which is close to the root
    because θ moves little in one step, and needs a few passes; sorting the breakpoints would take as long as twenty. If
    `kept` is out of reach, the result is the nearest reachable point: all entries at `low`, or all at 1.
    """
    total = weight.sum()
    if kept <= (weight * low).sum():
        return low.clone()
    if kept >= total:
        return torch.ones_like(target)
    if target.max() - target.min() > FAR:
        target = _near(target, weight, kept, low)
    ones = torch.ones_like(low)
    least, greatest = float((target - 1.0).min()), float((target - low).max())
    nu = min(max(0.0, least), greatest)
    for number in range(PASSES):
        moved = (target - nu).clamp(low, ones)
        excess = float(weight @ moved) - kept
        if excess == 0.0:
            break
        least, greatest = (nu, greatest) if excess > 0 else (least, nu)
        slope = float(weight[(moved > low) & (moved < 1.0)].sum())
        following = nu + excess / slope if slope > 0 else math.nan
        # Newton's method alone might creep from piece to piece, or alternate between two pieces for ever.
        if number % 3 == 2 or not least < following < greatest:
            following = (least + greatest) / 2
        if not least < following < greatest:
            break
        nu = following
    return (target - nu).clamp(low, ones)


def _near(target: Tensor, weight: Tensor, kept: int, low: Tensor) -> Tensor:
    """Shift `target` so that the root lies in [−1, 0], and clip the entries that end at a bound in any case.

    Take the largest entries until they could hold all that is kept. The last one is the pivot, and ν lies in
    [pivot − 1, pivot]. Clipping entries at a distance of 2 from the pivot keeps the digits of the others.
    """
    falling = target.argsort(descending=True)
    capacity = (weight * (1.0 - low))[falling].cumsum(0)
    pivot = target[falling][torch.searchsorted(capacity, kept - (weight * low).sum()).clamp_max(len(target) - 1)]
    return (target - pivot).clamp(-2.0, 2.0)


def hard_mask(theta: Tensor, space: MaskSpace, budget: Budget) -> Tensor:
    """Return the mask `(n,)` bool (True = kept) of the units of highest θ that fit the budget and its limits.

    In each layer, the units are sorted by falling θ and put into bundles of the budget's multiple; the last bundle may
    be smaller. A layer keeps its first bundles. The bundles of the minimum widths are kept in any case; the others are
    added by falling mean θ. A bundle that does not fit is skipped, and with it the rest of its layer. So a mask never
    exceeds the budget, and no further bundle would fit. Without limits a bundle is a unit: with equal costs, exactly
    ⌊kept / cost⌋ units are kept, whatever the ties. Ties are spread evenly over the layers (a threshold `θ ≥ t` would
    keep all of them).

    Raises ValueError if the minimum widths cost more than the budget.
    """
    bundles = bundled(theta, space, budget)
    return mask_of(bundles, bundles.mean, space, budget)


def mask_of(bundles: Bundles, value: Tensor, space: MaskSpace, budget: Budget) -> Tensor:
    """Return the mask of the units in `bundles` by falling `value` `(b,)` instead of the bundles' mean θ.

    Within a layer, the values must fall as the means do. A search over widths bundles its units once and then only
    changes the values. Raises ValueError as `hard_mask` does.
    """
    least, multiples = budget.limits(space)
    pair, number, cost, order = bundles.pair, bundles.number, bundles.cost, _order(bundles, value)
    kept = number * multiples[pair] < least[pair]
    refused_from = torch.full_like(least, len(number))  # by pair: the number of the first bundle that does not fit
    for constraint in budget:
        inside = (bundles.begin >= constraint.start) & (bundles.begin < constraint.stop)
        room = constraint.kept - int(cost[inside & kept].sum())
        if room < 0:
            raise ValueError(f"{constraint.name}: the minimum widths cost {-room} more than the {constraint.kept} kept")
        left = order[(inside & ~kept)[order]]
        while len(left):
            too_costly = left[cost[left] > room]
            refused_from.scatter_reduce_(0, pair[too_costly], number[too_costly], "amin")
            # A cheaper bundle may fit where one before it in the same layer does not. It is refused with it.
            left = left[number[left] < refused_from[pair[left]]]
            spent = cost[left].cumsum(0)
            taken = int(torch.searchsorted(spent, room, right=True))
            kept[left[:taken]] = True
            room -= int(spent[:taken][-1:].sum())
            left = left[taken:]
    return kept.index_select(0, bundles.of)


class Bundles(NamedTuple):
    """The bundles of every (family, layer), layer after layer, within a layer by falling θ.

    of: `(n,)` int64, the bundle of every unit; units of equal θ are ordered by their places. For each of the b bundles:
    pair: its (family, layer); number: its number there, from 0; begin: how many units the bundles before it hold; cost:
    its cost (all `(b,)` int64); mean: of its θ; evenness: the mean of its units' evenness (both `(b,)` float64).
    """

    of: Tensor
    pair: Tensor
    number: Tensor
    begin: Tensor
    cost: Tensor
    mean: Tensor
    evenness: Tensor


def bundled(theta: Tensor, space: MaskSpace, budget: Budget) -> Bundles:
    """Sort the units `(n,)` into bundles of the budget's multiples."""
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
    # A mean is rounded. Clamping it between its least and greatest θ keeps equal θ equal, so ties remain ties.
    mean = (_summed(ranked, at, len(size)) / size).clamp(ranked[begin + size - 1], ranked[begin])
    evenness = _summed(space.evenness[units], at, len(size)) / size
    of = torch.empty_like(at)
    of[units] = at
    cost = torch.zeros_like(size).index_add_(0, at, space.costs[units])
    return Bundles(of, pair, number, begin, cost, mean, evenness)


def _order(bundles: Bundles, value: Tensor) -> Tensor:
    """Return the bundles by falling value `(b,)`, ties by evenness."""
    order = bundles.evenness.argsort(stable=True)
    order = order[value[order].argsort(descending=True, stable=True)]
    # A layer's bundles keep their order, even if rounding gives different θ the same mean.
    order[bundles.pair[order].argsort(stable=True)] = torch.arange(len(order))
    return order


def _summed(values: Tensor, index: Tensor, length: int) -> Tensor:
    return torch.zeros(length, dtype=values.dtype).index_add_(0, index, values)


def coarser(budget: Budget, space: MaskSpace, multiples: Tensor) -> Budget:
    """Return the budget with `multiples` `(J,)` int64 in place of its own.

    Minimum widths are rounded down to them, because rounded up they might exceed the budget. A pair that keeps all its
    units still does.
    """
    least = budget.limits(space)[0]
    least = torch.where(least == space.pair_counts, least, least // multiples * multiples)
    return replace(budget, min_widths=tuple(least.tolist()), multiples=tuple(multiples.tolist()))
