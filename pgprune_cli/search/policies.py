"""What the search job moves: a policy draws masks, hears their losses, and says in the end which units stay.

Both wrap the pure steps of `core`: UnitPolicy those of `core.step` (θ, a keep probability a unit), WidthPolicy those of
`core.widths` (how many units each layer keeps, with its block repaired for that number).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from pgprune_cli.core import units
from pgprune_cli.core import widths as layers
from pgprune_cli.core.policy import entropy
from pgprune_cli.core.projection import Bundles, bundled, coarser, hard_mask, mask_of
from pgprune_cli.core.space import Budget, MaskSpace
from pgprune_cli.core.units import SearchState
from pgprune_cli.core.widths import WidthState
from pgprune_cli.model.prunable import ModelMask, Outputs
from pgprune_cli.repair.width_table import WidthTable, width_step

State = TypeVar("State", SearchState, WidthState)

RATE = 0.28
"""Automatic learning rate of the units policy: RATE / √steps. It is 2e-2 for 200 steps, the best of those tried, and
2.3e-3 for 15,000, about the paper's."""


class Policy(Protocol[State]):
    """The steps of one search, in terms of a state that can be saved."""

    @property
    def origin(self) -> Tensor:
        """What the search starts from, `(n,)` float64: of the same origin, budget and seed it is the same search."""

    def begin(self, seed: int) -> State: ...

    def propose(self, state: State, masks_per_step: int) -> tuple[State, Tensor, Tensor]:
        """The state with its generator moved on, the draws `(K, …)`, and the masks `(K, n)` they stand for."""

    def update(self, state: State, draws: Tensor, losses: Tensor) -> State: ...

    def mask(self, state: State) -> Tensor:
        """The decision as searched: `(n,)` bool."""

    def final_mask(self, state: State) -> Tensor:
        """The decision to be written, at the budget's full resolution: `(n,)` bool."""

    def outputs(self, keep: ModelMask) -> Outputs:
        """The repaired output projections that `keep` is to be evaluated with."""

    def rate(self, state: State) -> float | None:
        """The learning rate of the next update; None where there is no such thing."""

    def entropy(self, state: State) -> float:
        """Of the policy's distribution, in nats."""


@dataclass(frozen=True)
class UnitPolicy:
    """Independent keep probabilities θ `(n,)`, as in the paper."""

    origin: Tensor
    space: MaskSpace
    budget: Budget
    estimator: str
    learning_rate: float
    schedule: str
    steps: int

    def begin(self, seed: int) -> SearchState:
        return units.begin(self.origin, seed)

    def propose(self, state: SearchState, masks_per_step: int) -> tuple[SearchState, Tensor, Tensor]:
        state, masks = units.propose(state, masks_per_step)
        return state, masks, masks

    def update(self, state: SearchState, draws: Tensor, losses: Tensor) -> SearchState:
        return units.update(state, draws, losses, self.space, self.budget, self.estimator, self.rate(state))

    def mask(self, state: SearchState) -> Tensor:
        return hard_mask(state.theta, self.space, self.budget)

    final_mask = mask

    def outputs(self, keep: ModelMask) -> Outputs:
        return {}

    def rate(self, state: SearchState) -> float:
        full = self.learning_rate or RATE / math.sqrt(max(1, self.steps))
        return units.scheduled(full, self.schedule, state.step, self.steps)

    def entropy(self, state: SearchState) -> float:
        return float(entropy(state.theta))


@dataclass(frozen=True)
class WidthPolicy:
    """How much an error of every layer counts, which decides how many units each of them keeps.

    Searched over the widths of the table only, so that every sample runs with the repair that was solved for it.
    """

    table: WidthTable
    origin: Tensor
    space: MaskSpace
    budget: Budget

    def begin(self, seed: int) -> WidthState:
        return layers.begin(self.space, seed)

    def propose(self, state: WidthState, masks_per_step: int) -> tuple[WidthState, Tensor, Tensor]:
        state, offsets = layers.propose(state, masks_per_step, self.space)
        masks = torch.stack([self._mask(some) for some in offsets])
        return state, self.table.errors_of(masks, self.space), masks

    def update(self, state: WidthState, draws: Tensor, losses: Tensor) -> WidthState:
        return layers.update(state, draws, losses, self.space)

    def mask(self, state: WidthState) -> Tensor:
        return self._mask(state.mean)

    def final_mask(self, state: WidthState) -> Tensor:
        return hard_mask(layers.priorities(self.origin, state.mean, self.space), self.space, self.budget)

    def outputs(self, keep: ModelMask) -> Outputs:
        return self.table.outputs_for(keep)

    def rate(self, state: WidthState) -> None:
        return None

    def entropy(self, state: WidthState) -> float:
        return float(0.5 * (2 * math.pi * math.e * state.spread.square()).log().sum())

    def _mask(self, offsets: Tensor) -> Tensor:
        bundles = self._bundles
        return mask_of(bundles, bundles.mean + offsets[bundles.pair], self.space, self._coarse)

    @cached_property
    def _bundles(self) -> Bundles:
        """An offset moves a layer's units together, so that they are sorted once for all samples."""
        return bundled(self.origin, self.space, self._coarse)

    @cached_property
    def _coarse(self) -> Budget:
        """The budget in the table's widths."""
        of_budget = self.budget.limits(self.space)[1]
        pairs = zip(self.space.pair_counts.tolist(), of_budget.tolist(), strict=True)
        return coarser(
            self.budget, self.space, torch.tensor([width_step(count, multiple) for count, multiple in pairs])
        )
