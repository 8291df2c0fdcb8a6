"""The policy over layers: how many units each layer keeps, as explicit random variables above the units themselves.

Independent Bernoulli units leave a layer's width almost constant: of 1,536 channels ±20. Here a sample moves whole
layers. Every (family, layer) *pair* has a curve: the error that its block's output has at every width. A unit's
priority is the logarithm of what its removal adds to that error per parameter; a sample adds a Gaussian offset to all
units of a pair, and the units of highest priority that fit the budget stay. So every sample meets the budget exactly.

What the search learns is how much loss an error of each pair costs:  loss ≈ a constant a batch + Σ sensitivity·error,
over all samples heard so far. Ridge regression, its strength from the evidence (MacKay 1992), finds the sensitivities;
their logarithms are the next mean, and what is not known of them yet is the next spread. It is a natural policy
gradient with compatible features (Peters & Schaal 2008) that forgets no sample: the curves explain nine tenths of
the losses' variance, which estimators that only rank or weigh the samples of one step have to average away.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pgprune_cli.core.space import MaskSpace

SPREAD, LEAST_SPREAD = 0.3, 0.2
"""Standard deviation of a pair's offset, in nats of priority: before anything is known, and at least."""

FAMILY_SPREAD = 0.3
"""Of the offset that all pairs of a family share."""

RANGE = 5.0
"""A pair's sensitivity is at most so many times its family's, and at least as much less."""

ROUNDS, REFINEMENTS = 3, 30
"""Fits, each with less weight on what the last left unexplained, and steps of the evidence's fixed point in each."""


@dataclass(frozen=True)
class WidthState:
    """All that the next step depends on.

    mean: `(J,)` float64, the offsets that decide, the log sensitivity of every pair; spread: `(J,)` float64 of the
    samples around it; errors: `(N, J)` float64 of the samples heard so far; losses: `(N,)` float64, nats per token;
    heard: `(N,)` int64, in which step each was; step: steps done; skipped: losses left out because they were NaN or
    infinite; rng: uint8 generator state.
    """

    mean: Tensor
    spread: Tensor
    errors: Tensor
    losses: Tensor
    heard: Tensor
    step: int
    skipped: int
    rng: Tensor


def begin(space: MaskSpace, seed: int) -> WidthState:
    """The state before the first step: no offset, the starting spread."""
    pairs = len(space.pair_counts)
    return WidthState(
        torch.zeros(pairs, dtype=torch.float64),
        torch.full((pairs,), SPREAD, dtype=torch.float64),
        torch.zeros(0, pairs, dtype=torch.float64),
        torch.zeros(0, dtype=torch.float64),
        torch.zeros(0, dtype=torch.int64),
        0,
        0,
        torch.Generator().manual_seed(seed).get_state(),
    )


def propose(state: WidthState, masks_per_step: int, space: MaskSpace) -> tuple[WidthState, Tensor]:
    """`samples` offsets `(K, J)` in mirrored pairs around the mean, the last without its mirror where K is odd.

    Returns the state with the generator moved on.
    """
    generator = torch.Generator()
    generator.set_state(state.rng)
    half = (masks_per_step + 1) // 2
    own = torch.randn(half, len(state.mean), generator=generator, dtype=torch.float64)
    shared = torch.randn(half, len(space.families), generator=generator, dtype=torch.float64)
    around = state.spread * own + FAMILY_SPREAD * shared[:, space.family_of_pair]
    around = torch.stack([around, -around], dim=1).flatten(0, 1)[:masks_per_step]
    return replace(state, rng=generator.get_state()), state.mean + around


def update(state: WidthState, errors: Tensor, losses: Tensor, space: MaskSpace) -> WidthState:
    """Mean and spread after K more samples: their `errors` `(K, J)` and `losses` `(K,)`, nats per token, on one batch.

    NaN and infinite losses are left out and counted.
    """
    good = losses.isfinite()
    state = replace(
        state,
        errors=torch.cat([state.errors, errors[good].double()]),
        losses=torch.cat([state.losses, losses[good].double()]),
        heard=torch.cat([state.heard, torch.full((int(good.sum()),), state.step)]),
        step=state.step + 1,
        skipped=state.skipped + int((~good).sum()),
    )
    sensitivity, doubt = sensitivities(state.errors, state.losses, state.heard, space.family_of_pair)
    return replace(state, mean=sensitivity.log(), spread=(SPREAD * doubt).clamp_min(LEAST_SPREAD))


def sensitivities(errors: Tensor, losses: Tensor, heard: Tensor, family: Tensor) -> tuple[Tensor, Tensor]:
    """What one unit of error of every pair adds to the loss, and how much of what one did not know is left.

    Args:
        errors, losses, heard: of N samples, as in `WidthState`; only differences within a step count.
        family: `(J,)` int64.

    Returns:
        sensitivity `(J,)` float64 > 0, the greatest family's own 1; doubt `(J,)` float64, posterior over prior standard
        deviation. A pair's relative deviation from its family is N(0, τ²) beforehand, τ and the noise from the
        evidence. Samples far from all that fits count less (Cauchy weights). All 1 where the losses tell nothing.
    """
    nothing = torch.ones(errors.shape[1], dtype=torch.float64)
    members = (family[:, None] == torch.arange(int(family.max()) + 1)).double()
    unexplained = _within_steps(losses[:, None], heard, torch.ones_like(losses))[:, 0]
    # Equal losses differ from their mean by a rounding error.
    if len(losses) < 2 or not unexplained.abs().max() > 1e-12 * losses.abs().max():
        return nothing, nothing
    for _ in range(ROUNDS):
        weight = 1.0 / (1.0 + (unexplained / (2.0 * unexplained.abs().median().clamp_min(1e-12))).square())
        x, y = _within_steps(errors, heard, weight), _within_steps(losses[:, None], heard, weight)[:, 0]
        root = weight.sqrt()
        by_family = x @ members * root[:, None]
        base = torch.linalg.lstsq(by_family, (y * root)[:, None], driver="gelsd").solution[:, 0]
        if not base.max() > 0:
            return nothing, nothing
        base = base.clamp_min(base.max() / RANGE)[family]
        relative, doubt = _ridge(x * base * root[:, None], (y - x @ base) * root)
        unexplained = y - x @ (base * (1.0 + relative))
    sensitivity = base * (1.0 + relative).clamp(1.0 / RANGE, RANGE)
    return sensitivity / base.max(), doubt


def _within_steps(values: Tensor, heard: Tensor, weight: Tensor) -> Tensor:
    """`(N, m)` less the weighted mean of the same step: a batch that is hard for all samples says nothing."""
    steps, index = heard.unique(return_inverse=True)
    total = torch.zeros(len(steps), 1 + values.shape[1], dtype=values.dtype)
    total.index_add_(0, index, torch.cat([weight[:, None], weight[:, None] * values], dim=1))
    mean: Tensor = total[:, 1:] / total[:, :1]
    return values - mean[index]


def _ridge(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior mean `(J,)` of w in y = x w + noise, w ~ N(0, τ²), and its deviation over τ; both by evidence."""
    gram, right = x.T @ x, x.T @ y
    # In the eigenvectors of the Gram matrix every covariance that follows is diagonal.
    values, vectors = torch.linalg.eigh(gram)
    values, right = values.clamp_min(0.0), vectors.T @ right
    # Samples that the families alone explain leave a y of nothing: never less noise than can be inverted.
    floor = (1e-12 * (y.square().mean() + gram.trace() / len(y))).clamp_min(1e-30)
    prior, noise = 0.25, y.square().mean().clamp_min(floor)
    for _ in range(REFINEMENTS):
        variance = 1.0 / (values / noise + 1.0 / prior)
        mean = variance * right / noise
        known = (len(mean) - variance.sum() / prior).clamp_min(1e-3)
        prior = (mean.square().sum() / known).clamp(0.02, 1.0)
        noise = ((y - x @ (vectors @ mean)).square().sum() / (len(y) - known).clamp_min(1.0)).clamp_min(floor)
    deviation = (vectors.square() @ variance / prior).clamp(0.0, 1.0).sqrt()
    return vectors @ mean, deviation


def priorities(base: Tensor, offsets: Tensor, space: MaskSpace) -> Tensor:
    """The units' priorities `(n,)` under the pairs' offsets `(J,)`."""
    return base + offsets[space.pair_of]
