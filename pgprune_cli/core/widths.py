"""The policy over layers: how many units each layer keeps, as explicit random variables above the units themselves.

Independent Bernoulli units leave a layer's width almost constant: of 1,536 channels ±20. Here a sample moves whole
layers. Every unit has a priority, the logarithm of what its removal costs the output per parameter; a sample adds
Gaussian offsets: one to all units of a family, one to all units of a layer, and where a layer has few units (KV groups,
each dear and unlike the others) one to each of them; the units of highest priority that fit the budget stay. So every
sample meets the budget exactly, and units near the threshold come and go first. Many units (channels) keep their order.

The policy N(mean, spread²) follows the natural gradient of the expected loss, from mirrored samples compared on the
same batch; the spread is learned too. What is decided by is the average of the last means: each of them still carries
the noise of its batch. Only the losses' ranks count, so no rate depends on their scale, and the rates
follow from the dimension: separable natural evolution strategies (Wierstra et al. 2014, algorithm 6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pgprune_cli.core.space import Family, MaskSpace

LAYER_SPREAD, FAMILY_SPREAD, UNIT_SPREAD = 0.4, 0.7, 0.7
"""Standard deviations at the start, in nats of priority: a factor of 1.5 and of 2 in what a unit is worth."""

FEW = 64
"""Up to so many units in a layer, each has an offset of its own."""

MEAN_RATE = 0.5
"""Of the natural gradient's step. 1, the usual rate, went up and down with the batches (docs/log.md)."""

AVERAGED = 10
"""Means that the average reaches back over, about."""


@dataclass(frozen=True)
class WidthState:
    """All that the next step depends on.

    mean, spread: `(d,)` float64, family after family one coordinate for the family, one for each of its layers,
    and one for each unit of a family with few units a layer;
    average: `(d,)` of the last means, what is decided by;
    step: steps done; skipped: losses left out because they were NaN or infinite; rng: uint8 generator state.
    """

    mean: Tensor
    spread: Tensor
    average: Tensor
    step: int
    skipped: int
    rng: Tensor


def begin(space: MaskSpace, seed: int) -> WidthState:
    """The state before the first step: no offset, the starting spreads."""
    parts: list[float] = []
    for family in space.families:
        parts += [FAMILY_SPREAD] + [LAYER_SPREAD] * len(family.counts) + [UNIT_SPREAD] * _own_offsets(family)
    spread = torch.tensor(parts, dtype=torch.float64)
    return WidthState(
        torch.zeros_like(spread),
        spread,
        torch.zeros_like(spread),
        0,
        0,
        torch.Generator().manual_seed(seed).get_state(),
    )


def propose(state: WidthState, samples: int) -> tuple[WidthState, Tensor]:
    """`samples` deviates `(K, d)` from N(0, 1) in mirrored pairs (ε, −ε), the last without its mirror where K is odd.

    Returns the state with the generator moved on.
    """
    generator = torch.Generator()
    generator.set_state(state.rng)
    half = torch.randn((samples + 1) // 2, len(state.mean), generator=generator, dtype=torch.float64)
    deviates = torch.stack([half, -half], dim=1).flatten(0, 1)[:samples]
    return replace(state, rng=generator.get_state()), deviates


def utilities(losses: Tensor) -> Tensor:
    """What a sample's rank is worth, `(K,)` → `(K,)` float64 that sums to 0: the better half shares 1, all pay 1/K.

    u = max(0, log(K/2 + 1) − log(rank)) / Σ − 1/K, the least loss having rank 1 (Wierstra et al. 2014, eq. 11). The
    baseline is the step's own: whatever the batch adds to all losses changes no rank.
    """
    count = len(losses)
    ranks = losses.argsort(stable=True).argsort(stable=True).double() + 1.0
    worth = (math.log(count / 2 + 1) - ranks.log()).clamp_min(0.0)
    return worth / worth.sum() - 1.0 / count


def update(state: WidthState, deviates: Tensor, losses: Tensor) -> WidthState:
    """Mean and spread moved by losses `(K,)`, in nats per token, of the deviates `(K, d)` that `propose` gave.

    mean += MEAN_RATE·spread·Σ u·ε and log spread += rate·Σ u·(ε² − 1). NaN and infinite losses are left out and
    counted; with fewer than two good ones, or all equal, nothing moves.
    """
    good = losses.isfinite()
    state = replace(state, step=state.step + 1, skipped=state.skipped + int((~good).sum()))
    if good.sum() < 2 or not losses[good].max() > losses[good].min():
        return state
    worth, epsilon = utilities(losses[good]), deviates[good]
    dimension = len(state.mean)
    rate = (3.0 + math.log(dimension)) / (10.0 * math.sqrt(dimension))
    mean = state.mean + MEAN_RATE * state.spread * (worth @ epsilon)
    spread = state.spread * torch.exp(rate * (worth @ (epsilon.square() - 1.0)))
    average = state.average + (mean - state.average) / min(state.step, AVERAGED)
    return replace(state, mean=mean, spread=spread, average=average)


def priorities(base: Tensor, state: WidthState, deviate: Tensor | None, space: MaskSpace) -> Tensor:
    """The units' priorities `(n,)` under one deviate `(d,)`, or as decided by where it is None."""
    offsets = state.average if deviate is None else state.mean + state.spread * deviate
    parts = []
    place = 0
    for family in space.families:
        layers, own = len(family.counts), _own_offsets(family)
        part = offsets[place] + offsets[place + 1 : place + 1 + layers].repeat_interleave(torch.tensor(family.counts))
        place += 1 + layers
        parts.append(part + offsets[place : place + own] if own else part)
        place += own
    return base + torch.cat(parts)


def _own_offsets(family: Family) -> int:
    """How many units of the family have an offset of their own: all or none."""
    return family.size if max(family.counts, default=0) <= FEW else 0
