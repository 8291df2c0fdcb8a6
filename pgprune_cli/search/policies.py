"""The two policies of a search: each proposes masks, learns from their losses, and in the end says which units to keep.

Both wrap the pure steps of `core`. `UnitPolicy` wraps `core.units`: θ, one keep probability per unit. `WidthPolicy`
wraps `core.widths`: how many units each block keeps, with the block repaired for that width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from pgprune_cli.core import units, widths
from pgprune_cli.core.policy import entropy
from pgprune_cli.core.projection import Bundles, bundled, coarser, hard_mask, mask_of
from pgprune_cli.core.space import Budget, MaskSpace
from pgprune_cli.core.units import SearchState
from pgprune_cli.core.widths import WidthState
from pgprune_cli.model.masks import ModelMask, RepairedBlocks
from pgprune_cli.repair.width_table import WidthTable, width_step

State = TypeVar("State", SearchState, WidthState)

RATE = 0.28
"""The automatic learning rate of the unit search is RATE / √steps: 2e-2 for 200 steps, the best of those tried, and
2.3e-3 for 15,000, about the paper's."""


class Policy(Protocol[State]):
    """The steps of one search, in terms of a state that can be saved."""

    @property
    def origin(self) -> Tensor:
        """Where the search starts, `(n,)` float64. With the same origin, budget and seed it is the same search."""

    def begin(self, seed: int) -> State: ...

    def propose(self, state: State, masks_per_step: int) -> tuple[State, Tensor, Tensor]:
        """Return the state with its generator advanced, the draws `(K, …)`, and the masks `(K, n)` they stand for."""

    def update(self, state: State, draws: Tensor, losses: Tensor) -> State:
        """Return the state after learning from the losses `(K,)` of the draws."""

    def centre(self, state: State) -> Tensor:
        """Return what a decision is made from: θ `(n,)`, or the mean offsets `(J,)`, float64."""

    def mask(self, centre: Tensor) -> Tensor:
        """Return the mask `(n,)` with which a decision is evaluated during the search."""

    def final_mask(self, centre: Tensor) -> Tensor:
        """Return the mask `(n,)` to be written, at the full resolution of the budget."""

    @property
    def orders(self) -> Mapping[tuple[int, str], Tensor]:
        """By (layer, block), the units `(units,)` in the order in which every mask keeps them, if there is one."""

    @property
    def projections(self) -> Mapping[tuple[int, str], Sequence[Tensor]]:
        """By (layer, block) in the order in which they run, the repaired output projections of all widths."""

    def repaired(self, model_mask: ModelMask) -> RepairedBlocks:
        """Return the repaired blocks with which a proposed mask is evaluated, for elements that lie in `orders`."""

    def rate(self, state: State) -> float | None:
        """Return the learning rate of the next update, or None if the policy has none."""

    def entropy(self, state: State) -> float:
        """Return the entropy of the policy's distribution, in nats."""


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

    def centre(self, state: SearchState) -> Tensor:
        return state.theta

    def mask(self, centre: Tensor) -> Tensor:
        return hard_mask(centre, self.space, self.budget)

    final_mask = mask

    @property
    def orders(self) -> Mapping[tuple[int, str], Tensor]:
        return {}

    @property
    def projections(self) -> Mapping[tuple[int, str], Sequence[Tensor]]:
        return {}

    def repaired(self, model_mask: ModelMask) -> RepairedBlocks:
        return {}

    def rate(self, state: SearchState) -> float:
        full = self.learning_rate or RATE / math.sqrt(max(1, self.steps))
        return units.scheduled(full, self.schedule, state.step, self.steps)

    def entropy(self, state: SearchState) -> float:
        return float(entropy(state.theta))


@dataclass(frozen=True)
class WidthPolicy:
    """How much an error of every block counts, which decides how many units each of them keeps.

    Proposed masks have only widths of the table, so that each is evaluated with the repair solved for it.
    """

    table: WidthTable
    origin: Tensor
    space: MaskSpace
    budget: Budget

    def begin(self, seed: int) -> WidthState:
        return widths.begin(self.space, seed)

    def propose(self, state: WidthState, masks_per_step: int) -> tuple[WidthState, Tensor, Tensor]:
        state, offsets = widths.propose(state, masks_per_step, self.space)
        masks = torch.stack([self.mask(pair_offsets) for pair_offsets in offsets])
        return state, self.table.errors_of(masks, self.space), masks

    def update(self, state: WidthState, draws: Tensor, losses: Tensor) -> WidthState:
        return widths.update(state, draws, losses, self.space)

    def centre(self, state: WidthState) -> Tensor:
        return state.mean

    def mask(self, centre: Tensor) -> Tensor:
        bundles = self._bundles
        return mask_of(bundles, bundles.mean + centre[bundles.pair], self.space, self._table_budget)

    def final_mask(self, centre: Tensor) -> Tensor:
        return hard_mask(widths.priorities(self.origin, centre, self.space), self.space, self.budget)

    @property
    def orders(self) -> Mapping[tuple[int, str], Tensor]:
        return {key: order for key, order in self.table.orders.items() if len(order)}

    @property
    def projections(self) -> Mapping[tuple[int, str], Sequence[Tensor]]:
        return {key: [own.weight for own in by_width.values()] for key, by_width in self.table.repaired.items()}

    def repaired(self, model_mask: ModelMask) -> RepairedBlocks:
        return self.table.repaired_for(model_mask)

    def rate(self, state: WidthState) -> None:
        return None

    def entropy(self, state: WidthState) -> float:
        return float(0.5 * (2 * math.pi * math.e * state.spread.square()).log().sum())

    @cached_property
    def _bundles(self) -> Bundles:
        """The sorted units: an offset moves all units of a block together, so they are sorted once for all masks."""
        return bundled(self.origin, self.space, self._table_budget)

    @cached_property
    def _table_budget(self) -> Budget:
        """The budget, with the widths of the table as its grid."""
        multiples = self.budget.limits(self.space)[1]
        pairs = zip(self.space.pair_counts.tolist(), multiples.tolist(), strict=True)
        return coarser(
            self.budget, self.space, torch.tensor([width_step(count, multiple) for count, multiple in pairs])
        )
