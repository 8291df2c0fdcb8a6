"""The policy: every unit is kept independently with probability θ. Also the starting θ."""

from __future__ import annotations

import torch
from torch import Tensor

from pgprune_cli.core.projection import project
from pgprune_cli.core.space import Budget, MaskSpace


def sample(theta: Tensor, masks_per_step: int, generator: torch.Generator) -> Tensor:
    """Sample independent masks: `(masks_per_step, n)` bool, True = kept. θ = 0 and θ = 1 are certain."""
    uniform = torch.rand(masks_per_step, theta.numel(), generator=generator, dtype=torch.float64)
    return uniform < theta


def entropy(theta: Tensor) -> Tensor:
    """Return Σ H(θ_i) in nats. It is 0 if every unit is certain."""
    return -(torch.xlogy(theta, theta) + torch.xlogy(1.0 - theta, 1.0 - theta)).sum()


def starting_theta(scores: Tensor, space: MaskSpace, budget: Budget, start: str, temperature: float) -> Tensor:
    """Return a θ `(n,)` float64 that follows the scores `(n,)` within each layer and meets the budget.

    `sigmap` is the paper's: z-score within the layer, sigmoid, shifted to the keep fraction. `linear` runs from 0 at
    the layer's lowest score to 1 at its highest, `rank` is the fraction of the layer's units that score no higher;
    both are then shifted. A `temperature` below 1 moves θ closer to 0 and 1. Families with one unit per layer are
    compared across the layers instead, and `global-rank` compares all units with each other.
    """
    if start == "global-rank":
        return project(_rank(scores.double(), temperature), space, budget)
    squash = {"sigmap": _sigmap, "linear": _linear, "rank": _rank}[start]
    theta = torch.empty(space.n, dtype=torch.float64)
    for family in space.families:
        span = space.slice_of(family.name)
        values = scores[span].double()
        parts = [values] if max(family.counts) <= 1 else list(values.split(list(family.counts)))
        theta[span] = torch.cat([squash(part, temperature) for part in parts])
    return project(theta, space, budget)


def _sigmap(values: Tensor, temperature: float) -> Tensor:
    centred = values - values.mean() if values.numel() else values
    spread = centred.square().mean().sqrt()
    return torch.sigmoid(centred / (spread * temperature)) if spread > 0 else torch.full_like(values, 0.5)


def _rank(values: Tensor, temperature: float) -> Tensor:
    ranks = torch.searchsorted(values.sort().values, values, right=True).double() / max(len(values), 1)
    return 0.5 + (ranks - 0.5) / temperature


def _linear(values: Tensor, temperature: float) -> Tensor:
    low, high = (values.min(), values.max()) if values.numel() else (0.0, 0.0)
    if not high > low:
        return torch.full_like(values, 0.5)
    return 0.5 + ((values - low) / (high - low) - 0.5) / temperature
