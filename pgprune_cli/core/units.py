"""The unit search on one screen: propose masks, evaluate them, update θ.

    state = begin(theta, seed)
    for step in range(steps):
        rate = scheduled(learning_rate, schedule, step, steps)
        state, masks = propose(state, masks_per_step)
        state = update(state, masks, losses_of(masks), space, budget, estimator, rate)
    mask = hard_mask(state.theta, space, budget)

`losses_of` is any function from masks `(K, n)` to losses `(K,)`. The start is `policy.starting_theta`, and
`projection.hard_mask` turns the final θ into a mask that meets the budget.
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
    """Everything that the next step depends on.

    theta: `(n,)` float64 keep probabilities; baseline: nats per token, None before the first loss; step: steps done;
    skipped: NaN or infinite losses ignored so far; rng: uint8 state of the mask generator.
    """

    theta: Tensor
    baseline: float | None
    step: int
    skipped: int
    rng: Tensor


def begin(theta: Tensor, seed: int) -> SearchState:
    """Return the state before the first step. θ must already meet the budget."""
    return SearchState(theta.double(), None, 0, 0, torch.Generator().manual_seed(seed).get_state())


def propose(state: SearchState, masks_per_step: int) -> tuple[SearchState, Tensor]:
    """Sample masks `(masks_per_step, n)` bool from the policy. Also return the state with the generator advanced."""
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
    """Return the state with θ ← project(θ − learning_rate · gradient).

    masks: `(K, n)`; losses: `(K,)` in nats per token. NaN and infinite losses are ignored and counted. With fewer than
    two finite losses θ does not change.
    """
    finite = losses.isfinite()
    skipped = state.skipped + int((~finite).sum())
    if finite.sum() < 2:
        return replace(state, step=state.step + 1, skipped=skipped)
    gradient, baseline = ESTIMATORS[estimator](state.theta, masks[finite], losses[finite].double(), state.baseline)
    theta = project(state.theta - learning_rate * gradient, space, budget)
    return replace(state, theta=theta, baseline=baseline, step=state.step + 1, skipped=skipped)


def scheduled(learning_rate: float, schedule: str, step: int, steps: int) -> float:
    """Return the learning rate of `step` (from 0) out of `steps`: constant, or a half cosine down to 0."""
    if schedule == "constant":
        return learning_rate
    return learning_rate * 0.5 * (1.0 + math.cos(math.pi * step / steps))
