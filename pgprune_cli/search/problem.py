"""What a search decides on, and how it hears what a decision loses: fixed once model, text and scores are there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pgprune_cli.console.progress import Progress
from pgprune_cli.core.policy import starting_theta
from pgprune_cli.core.space import Budget, MaskSpace
from pgprune_cli.data.windows import Batches, CalibrationText
from pgprune_cli.distributed import Ranks
from pgprune_cli.errors import UserError
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.model.prunable import ModelMask, Outputs
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.run.scores import Scores
from pgprune_cli.scores.metrics import flat_scores
from pgprune_cli.search.policies import Policy, UnitPolicy, WidthPolicy
from pgprune_cli.search.table import searched_table
from pgprune_cli.search.texts import repair_batches


@dataclass
class Problem:
    """What is searched."""

    evaluator: Evaluator
    space: MaskSpace
    policy: Policy  # type: ignore[type-arg]  # of the state that it began with
    batches: Batches
    heldout: Tensor
    recipe: Recipe
    ranks: Ranks

    def keep(self, mask: Tensor) -> ModelMask:
        return self.evaluator.shape.keep(self.space, mask)

    def losses(self, masks: Tensor, tokens: Tensor) -> Tensor:
        """Of masks `(K, n)` on one batch, with the repair that the policy has for each: `(K,)` nats per token."""
        self.ranks.refuse_differences(masks, tokens)
        keeps = [self.keep(masks[index]) for index in self.ranks.share(len(masks))]
        own = self.evaluator.losses(keeps, tokens, [self.policy.outputs(keep) for keep in keeps])
        return self.ranks.gathered(own, len(masks))

    def heldout_loss(self, keep: ModelMask, outputs: Outputs) -> float:
        """Of one decision on text the search never sees: nats per token."""
        batches = self.heldout.split(self.recipe.calibration.batch)
        share = [batches[index] for index in self.ranks.share(len(batches))]
        own = [float(self.evaluator.losses([keep], tokens, [outputs])[0]) for tokens in share]
        losses = self.ranks.gathered(torch.tensor(own, dtype=torch.float64), len(batches)).tolist()
        return sum(loss * len(tokens) for loss, tokens in zip(losses, batches, strict=True)) / len(self.heldout)


def policy_of(
    recipe: Recipe,
    run: Path,
    evaluator: Evaluator,
    space: MaskSpace,
    budget: Budget,
    scores: Scores,
    text: CalibrationText,
    ranks: Ranks,
    progress: Progress,
) -> UnitPolicy | WidthPolicy:
    """What the recipe searches with. Raises UserError for families that the layers policy has no widths of."""
    settings = recipe.search
    if settings.policy == "units":
        scores = flat_scores(scores.tensors, evaluator.shape, space)
        theta = starting_theta(scores, space, budget, recipe.start.mapping, recipe.start.temperature)
        estimator, rate, schedule = settings.estimator, settings.learning_rate, settings.schedule
        return UnitPolicy(theta, space, budget, estimator, rate, schedule, settings.steps)
    if whole := [name for name in recipe.units.families if name not in ("attention", "ffn")]:
        raise UserError(
            f"units.families: {whole[0]} is kept or removed as a whole, so there are no widths to search over; "
            "set search.policy to units"
        )
    saliency_of: dict[tuple[int, str], Tensor] = {
        (index, name): scores.tensors[f"layers.{index}.{name}"]
        for name in recipe.units.families
        for index in range(len(evaluator.shape.channels))
    }
    batches = repair_batches(recipe, text)
    table = searched_table(recipe, run, evaluator.model, saliency_of, batches, scores.fingerprint, ranks, progress)
    return WidthPolicy(table, table.priorities(space), space, budget)
