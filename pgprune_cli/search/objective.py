"""What a search minimises: the next-token loss of a mask, or how far its model is from the dense one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from pgprune_cli.forward.divergence import HIDDEN_WEIGHT, Divergence, States
from pgprune_cli.model.masks import ModelMask, RepairedBlocks
from pgprune_cli.search.context import SearchContext
from pgprune_cli.search.texts import step_batches


class HeldOut(NamedTuple):
    """The objective of one mask and its next-token loss on text that the search never reads, in nats per token."""

    objective: float
    loss: float


class Objective:
    """Evaluates masks by `search.objective` of the recipe."""

    def __init__(self, context: SearchContext) -> None:
        self.context = context
        name = context.recipe.search.objective
        weight = HIDDEN_WEIGHT if name == "kl-hidden" else 0.0
        self.divergence = None if name == "loss" else Divergence(context.evaluator, weight)
        self.batches = step_batches(context.recipe, context.text)
        self._ahead: dict[int, States] = {}

    def evaluate_dense(self) -> None:
        """Compute what the held-out objective needs of the dense model, once."""
        if self.divergence is not None:
            _ = self._heldout_states

    def values(self, model_masks: Sequence[ModelMask], position: int, repaired: Sequence[RepairedBlocks]) -> Tensor:
        """Return the objective of K masks on the batch at a position: `(K,)` float64, nats per token.

        All processes of the search call this for the same position, each with its own masks.
        """
        tokens = self.batches.at(position)
        if self.divergence is None:
            return self.context.evaluator.losses(model_masks, tokens, repaired)
        dense = self._dense_states(self.divergence, position)
        if not model_masks:
            return torch.zeros(0, dtype=torch.float64)
        return self.divergence.values(model_masks, tokens, repaired, dense).objective

    def _dense_states(self, divergence: Divergence, position: int) -> States:
        """Return the dense model's states on the batch at a position.

        Several processes compute those of as many steps at a time, one each.
        """
        ranks, steps = self.context.ranks, self.context.recipe.search.steps
        if ranks.world_size == 1:
            return divergence.dense_states(self.batches.at(position))
        if position not in self._ahead:
            positions = range(position, max(position + 1, min(position + ranks.world_size, steps)))
            batches = [self.batches.at(step) for step in positions]
            packed = ranks.divide(
                lambda index: divergence.dense_states(batches[index]).packed(),
                [divergence.packed_shape(tokens) for tokens in batches],
                self.context.model.dtype,
            )
            states = (States.of(rows, tokens) for rows, tokens in zip(packed, batches, strict=True))
            self._ahead = dict(zip(positions, states, strict=True))
        return self._ahead[position].to(self.context.model.device)

    def on_heldout(self, model_mask: ModelMask, repaired: RepairedBlocks) -> HeldOut:
        """Return what one mask costs on the held-out text. The processes of the search share its batches."""
        ranks, batches = self.context.ranks, self._heldout_batches
        own = [self._of_batch(model_mask, repaired, index) for index in ranks.share(len(batches))]
        columns = torch.tensor(own, dtype=torch.float64).reshape(-1, 2).unbind(1)
        objective, loss = (ranks.gather(column, len(batches)).tolist() for column in columns)
        return HeldOut(_mean(objective, batches), _mean(loss, batches))

    def _of_batch(self, model_mask: ModelMask, repaired: RepairedBlocks, index: int) -> tuple[float, float]:
        tokens = self._heldout_batches[index]
        if self.divergence is None:
            loss = float(self.context.evaluator.losses([model_mask], tokens, [repaired])[0])
            return loss, loss
        dense = self._heldout_states[index].to(self.context.model.device)
        values = self.divergence.values([model_mask], tokens, [repaired], dense)
        return float(values.objective[0]), float(values.loss[0])

    @cached_property
    def _heldout_batches(self) -> Sequence[Tensor]:
        batches: Sequence[Tensor] = self.context.text.heldout.split(self.context.recipe.calibration.batch)
        return batches

    @cached_property
    def _heldout_states(self) -> dict[int, States]:
        """The dense model's states on this process's share of the held-out batches, in the host's memory."""
        assert self.divergence is not None
        batches = self._heldout_batches
        share = self.context.ranks.share(len(batches))
        return {index: self.divergence.dense_states(batches[index]).to("cpu") for index in share}


def _mean(values: Sequence[float], batches: Sequence[Tensor]) -> float:
    """Return the mean over all windows of the values of their batches."""
    return sum(value * len(tokens) for value, tokens in zip(values, batches, strict=True)) / sum(map(len, batches))
