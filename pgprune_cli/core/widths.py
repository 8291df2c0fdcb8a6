"""The policy over widths: a random variable per block says how many units the block keeps.

Independent Bernoulli units leave a layer's width almost constant: of 1,536 channels, it varies by about 20. Here a
sample changes the widths of whole layers. Every (family, layer) *pair* has a curve: the error of its block's output at
each width. A unit's priority is the logarithm of the error that removing it adds, per unit of its cost in the budget's
measure. A sample adds one Gaussian offset to all units of a pair, and the units of highest priority that fit the budget
are kept. So no sample exceeds the budget, and each falls short of it by less than one step of the table.

The search learns how much loss an error of each pair costs, from all samples so far:

    loss ≈ a constant for the batch + Σ sensitivity · error

Ridge regression finds the sensitivities; the evidence sets its strength (MacKay 1992). Their logarithms are the mean of
the next step, and their remaining uncertainty is its spread. This is a natural policy gradient with compatible features
(Peters & Schaal 2008) that uses every sample of the search. The curves explain nine tenths of the variance of the
losses; an estimator that only ranks or weighs the samples of one step has to average that variance away.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pgprune_cli.core.space import MaskSpace

SPREAD, LEAST_SPREAD = 0.3, 0.2
"""Standard deviation of a pair's offset, in nats of priority: of the first step, and the least of any step."""

FAMILY_SPREAD = 0.3
"""Standard deviation of the offset that all pairs of a family share."""

RANGE = 5.0
"""A pair's sensitivity is at most RANGE times its family's, and at least 1 / RANGE times."""

ROUNDS, REFINEMENTS = 3, 30
"""Number of fits, each with less weight on the last one's outliers, and of the evidence's fixed-point steps in each."""


@dataclass(frozen=True)
class WidthState:
    """Everything that the next step depends on.

    mean: `(J,)` float64, the log sensitivity of every pair, which is also the offset of the decision; spread: `(J,)`
    float64, the standard deviation of the samples around the mean; errors: `(N, J)` float64, of the N samples so far;
    losses: `(N,)` float64, nats per token; sample_steps: `(N,)` int64, the step of each sample; step: steps done;
    skipped: losses left out because they were NaN or infinite; rng: uint8 generator state.
    """

    mean: Tensor
    spread: Tensor
    errors: Tensor
    losses: Tensor
    sample_steps: Tensor
    step: int
    skipped: int
    rng: Tensor


def begin(space: MaskSpace, seed: int) -> WidthState:
    """Return the state before the first step: no offset, the starting spread."""
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
    """Return offsets `(K, J)` for K = `masks_per_step` samples, and the state with its generator advanced.

    Samples come in mirrored pairs around the mean; if K is odd, the last one has no mirror image.
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
    """Return the state after K more samples on one batch.

    errors: `(K, J)`; losses: `(K,)`, nats per token. NaN and infinite losses are left out and counted.
    """
    good = losses.isfinite()
    state = replace(
        state,
        errors=torch.cat([state.errors, errors[good].double()]),
        losses=torch.cat([state.losses, losses[good].double()]),
        sample_steps=torch.cat([state.sample_steps, torch.full((int(good.sum()),), state.step)]),
        step=state.step + 1,
        skipped=state.skipped + int((~good).sum()),
    )
    sensitivity, doubt = sensitivities(state.errors, state.losses, state.sample_steps, space.family_of_pair)
    return replace(state, mean=sensitivity.log(), spread=(SPREAD * doubt).clamp_min(LEAST_SPREAD))


def sensitivities(errors: Tensor, losses: Tensor, sample_steps: Tensor, family: Tensor) -> tuple[Tensor, Tensor]:
    """Return how much loss an error of each pair costs, and how uncertain that is.

    The prior of a pair's relative deviation from its family is N(0, τ²); the evidence sets τ and the noise. Samples far
    from the fit count less (Cauchy weights).

    Args:
        errors, losses, sample_steps: of N samples, as in `WidthState`; only differences within a step count.
        family: `(J,)` int64, the family of each pair.

    Returns:
        sensitivity `(J,)` float64 > 0, relative to the most sensitive family; doubt `(J,)` float64, the posterior
        standard deviation divided by the prior one. Both are 1 everywhere if the losses carry no information.
    """
    uninformed = torch.ones(errors.shape[1], dtype=torch.float64)
    members = (family[:, None] == torch.arange(int(family.max()) + 1)).double()
    unexplained = _within_steps(losses[:, None], sample_steps, torch.ones_like(losses))[:, 0]
    # Equal losses differ from their mean by a rounding error.
    if len(losses) < 2 or not unexplained.abs().max() > 1e-12 * losses.abs().max():
        return uninformed, uninformed
    for _ in range(ROUNDS):
        weight = 1.0 / (1.0 + (unexplained / (2.0 * unexplained.abs().median().clamp_min(1e-12))).square())
        x, y = (
            _within_steps(errors, sample_steps, weight),
            _within_steps(losses[:, None], sample_steps, weight)[:, 0],
        )
        root = weight.sqrt()
        by_family = x @ members * root[:, None]
        base = torch.linalg.lstsq(by_family, (y * root)[:, None], driver="gelsd").solution[:, 0]
        if not base.max() > 0:
            return uninformed, uninformed
        base = base.clamp_min(base.max() / RANGE)[family]
        relative, doubt = _ridge(x * base * root[:, None], (y - x @ base) * root)
        unexplained = y - x @ (base * (1.0 + relative))
    sensitivity = base * (1.0 + relative).clamp(1.0 / RANGE, RANGE)
    return sensitivity / base.max(), doubt


def _within_steps(values: Tensor, sample_steps: Tensor, weight: Tensor) -> Tensor:
    """Subtract from values `(N, m)` the weighted mean of their step: a batch may be hard for all samples."""
    steps, index = sample_steps.unique(return_inverse=True)
    total = torch.zeros(len(steps), 1 + values.shape[1], dtype=values.dtype)
    total.index_add_(0, index, torch.cat([weight[:, None], weight[:, None] * values], dim=1))
    mean: Tensor = total[:, 1:] / total[:, :1]
    return values - mean[index]


def _ridge(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the posterior mean `(J,)` of w in y = x w + noise, w ~ N(0, τ²), and its standard deviation divided by τ.

    The evidence sets τ and the noise.
    """
    gram, right = x.T @ x, x.T @ y
    # In the basis of the Gram matrix's eigenvectors, every covariance below is diagonal.
    values, vectors = torch.linalg.eigh(gram)
    values, right = values.clamp_min(0.0), vectors.T @ right
    # If the families alone explain the samples, y is zero. The noise must stay large enough to divide by.
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
    """Return the priorities `(n,)` of the units under the offsets `(J,)` of their pairs."""
    return base + offsets[space.pair_of]
