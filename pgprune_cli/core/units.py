"""The search, one step at a time: propose masks, hear their losses, move θ.

state = begin(theta, seed)
for _ in range(steps):
    state, masks = propose(state, samples)
    state = update(state, masks, losses_of(masks), space, budget, estimator, learning_rate)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pgprune_cli.core.estimator import ESTIMATORS
from pgprune_cli.core.policy import sample
from pgprune_cli.core.projection import project
from pgprune_cli.core.space import Budget, MaskSpace


@dataclass(frozen=True)
class SearchState:
    """All that the next step depends on.

    theta: `(n,)` float64 keep probabilities; baseline: nats per token, None before the first loss; step: steps done;
    skipped: losses left out so far because they were NaN or infinite; rng: uint8 state of the mask generator.
    """

    theta: Tensor
    baseline: float | None
    step: int
    skipped: int
    rng: Tensor


def begin(theta: Tensor, seed: int) -> SearchState:
    """The state before the first step. θ must meet the budget already."""
    return SearchState(theta.double(), None, 0, 0, torch.Generator().manual_seed(seed).get_state())


def propose(state: SearchState, masks_per_step: int) -> tuple[SearchState, Tensor]:
    """`samples` masks `(K, n)` bool from the policy, and the state with the generator moved on."""
    generator = torch.Generator()
    generator.set_state(state.rng)
    masks = sample(state.theta, masks_per_step, generator)
    return replace(state, rng=generator.get_state()), masks


def update(
    state: SearchState,
    masks: Tensor,
    losses: Tensor,
    space: MaskSpace,
    budget: Budget,
    estimator: str,
    learning_rate: float,
) -> SearchState:
    """θ ← project(θ − learning_rate · gradient) from masks `(K, n)` and their losses `(K,)` in nats per token.

    NaN and infinite losses are left out and counted; with fewer than two good ones θ stays where it is.
    """
    good = losses.isfinite()
    skipped = state.skipped + int((~good).sum())
    if good.sum() < 2:
        return replace(state, step=state.step + 1, skipped=skipped)
    gradient, baseline = ESTIMATORS[estimator](state.theta, masks[good], losses[good].double(), state.baseline)
    theta = project(state.theta - learning_rate * gradient, space, budget)
    return replace(state, theta=theta, baseline=baseline, step=state.step + 1, skipped=skipped)


def scheduled(learning_rate: float, schedule: str, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of `steps`: constant, or a half cosine from its full value to 0."""
    if schedule == "constant":
        return learning_rate
    return learning_rate * 0.5 * (1.0 + math.cos(math.pi * step / steps))
