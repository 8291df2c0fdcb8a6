"""The policy over layers: how many units each layer keeps, as explicit random variables above the units' own order.

Independent Bernoulli units leave a layer's width almost constant: of 1,536 channels ±20. Here a sample moves whole
layers. Every unit has a priority, the logarithm of what its removal costs the output per parameter; a sample adds one
Gaussian offset to all units of a layer, and one more to all of a family; the units of highest priority that fit the
budget stay. So every sample meets the budget exactly, and its masks are nested within a layer.

The policy N(mean, spread²) follows the natural gradient of the expected loss, from mirrored samples compared on the
same batch; the spread is learned too. Only the losses' ranks count, so no rate depends on their scale, and the rates
follow from the dimension: separable natural evolution strategies (Wierstra et al. 2014, algorithm 6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pgprune_cli.core.space import MaskSpace

LAYER_SPREAD, FAMILY_SPREAD = 0.4, 0.7
"""Standard deviations at the start, in nats of priority: a factor of 1.5 and of 2 in what a unit is worth."""


@dataclass(frozen=True)
class WidthState:
    """All that the next step depends on.

    mean, spread: `(d,)` float64, one coordinate for each (family, layer), family-major, then one for each family;
    step: steps done; skipped: losses left out because they were NaN or infinite; rng: uint8 generator state.
    """

    mean: Tensor
    spread: Tensor
    step: int
    skipped: int
    rng: Tensor


def begin(space: MaskSpace, seed: int) -> WidthState:
    """The state before the first step: no offset, the starting spreads."""
    pairs = sum(len(family.counts) for family in space.families)
    spread = torch.tensor([LAYER_SPREAD] * pairs + [FAMILY_SPREAD] * len(space.families), dtype=torch.float64)
    return WidthState(torch.zeros_like(spread), spread, 0, 0, torch.Generator().manual_seed(seed).get_state())


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

    mean += spread·Σ u·ε and log spread += rate·Σ u·(ε² − 1). NaN and infinite losses are left out and counted; with
    fewer than two good ones, or all equal, nothing moves.
    """
    good = losses.isfinite()
    state = replace(state, step=state.step + 1, skipped=state.skipped + int((~good).sum()))
    if good.sum() < 2 or not losses[good].max() > losses[good].min():
        return state
    worth, epsilon = utilities(losses[good]), deviates[good]
    dimension = len(state.mean)
    rate = (3.0 + math.log(dimension)) / (10.0 * math.sqrt(dimension))
    mean = state.mean + state.spread * (worth @ epsilon)
    spread = state.spread * torch.exp(rate * (worth @ (epsilon.square() - 1.0)))
    return replace(state, mean=mean, spread=spread)


def priorities(base: Tensor, state: WidthState, deviate: Tensor | None, space: MaskSpace) -> Tensor:
    """The units' priorities `(n,)` under one deviate `(d,)`, or under the mean alone where it is None."""
    offsets = state.mean if deviate is None else state.mean + state.spread * deviate
    parts = []
    layer_place, family_place = 0, len(offsets) - len(space.families)
    for family in space.families:
        own = offsets[layer_place : layer_place + len(family.counts)] + offsets[family_place]
        parts.append(own.repeat_interleave(torch.tensor(family.counts)))
        layer_place, family_place = layer_place + len(family.counts), family_place + 1
    return base + torch.cat(parts)
