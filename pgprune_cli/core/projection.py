"""From any θ to one that meets the budget, and from θ to a mask that does."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pgprune_cli.core.space import Budget, MaskSpace


def project(theta: Tensor, space: MaskSpace, budget: Budget) -> Tensor:
    """The nearest point of {0 ≤ θ ≤ 1, Σ cost·θ = kept for every constraint}, exactly. `(n,)` → `(n,)` float64.

    Distance is Σ cost·(x − θ)², every parameter counting once: with equal costs it is the Euclidean projection of
    the paper, and with unequal ones a dear unit is not moved further than a cheap one merely for being dear.
    """
    projected = torch.empty_like(theta, dtype=torch.float64)
    for constraint in budget:
        units = constraint.units
        projected[units] = _project_one(theta[units].double(), space.costs[units].double(), constraint.kept)
    return projected


def _project_one(theta: Tensor, cost: Tensor, kept: int) -> Tensor:
    """KKT: x = clip(θ − ν, 0, 1) for one ν. Σ cost·x falls piecewise linearly in ν, so its root is found exactly.

    A unit starts to fall at ν = θ − 1 (it leaves 1) and stops at ν = θ (it reaches 0).
    """
    total = cost.sum()
    if kept <= 0:
        return torch.zeros_like(theta)
    if kept >= total:
        return torch.ones_like(theta)
    bends, order = torch.cat([theta - 1.0, theta]).sort()
    slope = torch.cat([cost, -cost])[order].cumsum(0)
    fallen = torch.cat([bends.new_zeros(1), (slope[:-1] * bends.diff()).cumsum(0)])
    before = int(torch.searchsorted(fallen, total - kept, right=True)) - 1
    nu = bends[before] + (total - kept - fallen[before]) / slope[before]
    return (theta - nu).clamp(0.0, 1.0)


def hard_mask(theta: Tensor, space: MaskSpace, budget: Budget) -> Tensor:
    """The units of highest θ that fit each constraint: `(n,)` bool, True = kept.

    Never above the budget, and no left-out unit would still fit: with equal costs exactly ⌊kept / cost⌋ units stay,
    whatever ties there are. Ties fall evenly over the layers (a threshold `θ ≥ t` would keep all of them).
    """
    mask = torch.zeros(space.n, dtype=torch.bool)
    by_evenness = space.evenness.argsort(stable=True)
    ranked = by_evenness[theta[by_evenness].argsort(descending=True, stable=True)]
    for constraint in budget:
        candidates = ranked[(ranked >= constraint.start) & (ranked < constraint.stop)]
        room = constraint.kept
        while len(candidates := candidates[space.costs[candidates] <= room]):
            spent = space.costs[candidates].cumsum(0)
            taken = int(torch.searchsorted(spent, room, right=True))
            mask[candidates[:taken]] = True
            room -= int(spent[taken - 1])
            candidates = candidates[taken:]
    return mask


def bundled_mask(value: Tensor, space: MaskSpace, budget: Budget, multiples: Mapping[str, int]) -> Tensor:
    """Like `hard_mask`, but a layer's units stay in bundles: `(n,)` values → `(n,)` bool.

    A layer keeps a multiple of `multiples[family]` of its units, those of highest value, or all of them. Bundles are
    taken by falling mean value, ties evenly over the layers; one that does not fit ends its layer.
    """
    mask = torch.zeros(space.n, dtype=torch.bool)
    for constraint in budget:
        bundles: list[tuple[float, float, int, Tensor, int]] = []
        place = layer_id = 0
        for family in space.families:
            for count, cost in zip(family.counts, family.costs, strict=True):
                if constraint.start <= place < constraint.stop and count:
                    ranked = place + value[place : place + count].argsort(descending=True, stable=True)
                    mean = float("inf")
                    for number, units in enumerate(ranked.split(multiples[family.name])):
                        # Of equal values a later bundle's mean can be rounded above an earlier one's.
                        mean = min(mean, float(value[units].mean()))
                        bundles.append((-mean, number / count, layer_id, units, cost * len(units)))
                place, layer_id = place + count, layer_id + 1
        room, ended = constraint.kept, set()
        for _, _, layer, units, cost in sorted(bundles, key=lambda bundle: bundle[:3]):
            if layer in ended or cost > room:
                ended.add(layer)
            else:
                mask[units] = True
                room -= cost
    return mask
