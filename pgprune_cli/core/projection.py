"""From any θ to one that meets the budget, and from θ to a mask that does."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pgprune_cli.core.space import Budget, MaskSpace


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

    KKT: x = clip(wanted − ν, low, 1) for one ν. Σ weight·x falls piecewise linearly in ν, so its root is found exactly.
    An entry starts to fall at ν = wanted − 1 (it leaves 1) and stops at ν = wanted − low. A `kept` out of reach gives
    the nearest that is in reach: all entries at `low`, or all at 1.

    The greatest entries that together could have what is kept end with a pivot, and ν is in [pivot − 1, pivot]. Entries
    further than 2 from it are at a bound in any case, so that none of them, however far, costs the others their digits.
    """
    total = weight.sum()
    if kept <= (weight * low).sum():
        return low.clone()
    if kept >= total:
        return torch.ones_like(wanted)
    falling = wanted.argsort(descending=True)
    could = (weight * (1.0 - low))[falling].cumsum(0)
    pivot = wanted[falling][torch.searchsorted(could, kept - (weight * low).sum()).clamp_max(len(wanted) - 1)]
    wanted = (wanted - pivot).clamp(-2.0, 2.0)
    bends, order = torch.cat([wanted - 1.0, wanted - low]).sort()
    slope = torch.cat([weight, -weight])[order].cumsum(0)
    fallen = torch.cat([bends.new_zeros(1), (slope[:-1] * bends.diff()).cumsum(0)])
    before = int(torch.searchsorted(fallen, total - kept, right=True)) - 1
    nu = bends[before] + (total - kept - fallen[before]) / slope[before]
    return (wanted - nu).clamp(low, torch.ones_like(low))


def hard_mask(theta: Tensor, space: MaskSpace, budget: Budget) -> Tensor:
    """The units of highest θ that fit each constraint and keep to its limits: `(n,)` bool, True = kept.

    Within a layer the units, by falling θ, stand in bundles of the budget's multiple, the last one perhaps smaller; a
    layer keeps its first bundles. Those of the least width stay in any case, then bundles by falling mean θ, one that
    does not fit being passed over and with it the rest of its layer. So a mask is never above the budget, and no
    further bundle would still fit. Without limits a bundle is a unit: with equal costs exactly ⌊kept / cost⌋ units
    stay, whatever ties there are. Ties fall evenly over the layers (a threshold `θ ≥ t` would keep all of them).

    Raises ValueError where the least widths are above the budget.
    """
    least, multiples = budget.limits(space)
    bundles = _bundles(theta, space, multiples)
    pair, number, cost = bundles.pair, bundles.number, bundles.cost
    kept = number * multiples[pair] < least[pair]
    refused = torch.zeros_like(kept)
    for constraint in budget:
        inside = (bundles.begin >= constraint.start) & (bundles.begin < constraint.stop)
        room = constraint.kept - int(cost[inside & kept].sum())
        if room < 0:
            raise ValueError(f"{constraint.name}: the least widths cost {-room} more than the {constraint.kept} kept")
        left = bundles.order[(inside & ~kept)[bundles.order]]
        while len(left):
            refused[left[cost[left] > room]] = True
            # A smaller bundle at the end of a layer may fit where the one above it does not; it goes with that one.
            left = left[~refused[left] & ((number[left] == 0) | ~refused[left - 1])]
            spent = cost[left].cumsum(0)
            taken = int(torch.searchsorted(spent, room, right=True))
            kept[left[:taken]] = True
            room -= int(spent[:taken][-1:].sum())
            left = left[taken:]
    mask = torch.zeros(space.n, dtype=torch.bool)
    mask[bundles.units] = kept[bundles.at]
    return mask


class _Bundles(NamedTuple):
    """The bundles of every (family, layer), numbered one layer after the other, within a layer by falling θ.

    units: `(n,)` the units in that order, equal ones of a layer in their own; at: `(n,)` the bundles they are in. And
    of every bundle, `(b,)`: its (family, layer); its number there, from 0; where in `units` it begins; its cost.
    order: the bundles by falling mean θ, ties by their places in their layers. All int64.
    """

    units: Tensor
    at: Tensor
    pair: Tensor
    number: Tensor
    begin: Tensor
    cost: Tensor
    order: Tensor


def _bundles(theta: Tensor, space: MaskSpace, multiples: Tensor) -> _Bundles:
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
    order = evenness.argsort(stable=True)
    order = order[mean[order].argsort(descending=True, stable=True)]
    # And a layer's bundles keep their order, even where θ that differ by a rounding error have one mean.
    order[pair[order].argsort(stable=True)] = torch.arange(len(order))
    return _Bundles(units, at, pair, number, begin, size * space.pair_costs[pair], order)


def _summed(values: Tensor, index: Tensor, length: int) -> Tensor:
    return torch.zeros(length, dtype=values.dtype).index_add_(0, index, values)


def bundled_mask(value: Tensor, space: MaskSpace, budget: Budget, multiples: Tensor) -> Tensor:
    """Like `hard_mask`, but widths are multiples of `multiples` `(J,)` instead of the budget's: `(n,)` → `(n,)` bool.

    For a search on a coarser grid than its result's: least widths are rounded down to it, for up might not fit.
    """
    least = budget.limits(space)[0] // multiples * multiples
    return hard_mask(value, space, replace(budget, least=tuple(least.tolist()), multiples=tuple(multiples.tolist())))
