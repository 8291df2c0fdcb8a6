"""Scores of every element, computed for a search or read from its run directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from pgprune_cli.console.progress import SILENT, Progress
from pgprune_cli.distributed import Ranks
from pgprune_cli.errors import RunError, UserError
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.run.layout import SCORES_FILE
from pgprune_cli.run.scores import Scores
from pgprune_cli.scores.metrics import score, score_name
from pgprune_cli.search.context import SearchContext
from pgprune_cli.search.texts import scoring_batches


def compute_scores(
    recipe: Recipe,
    model: PrunableModel,
    batches: Sequence[Tensor],
    fingerprint: str,
    *,
    ranks: Ranks,
    progress: Progress = SILENT,
) -> Scores:
    """Score every element with the recipe's metric. Each process scores its share of the layers.

    batches: tokens `(B, T)` for a calibrated metric. Raises RunError if a score is not finite.
    """
    metric = recipe.scores.metric
    own_layers = ranks.share(model.shape.layers)
    sizes = {
        score_name(layer, block.name): model.shape.elements[block.name][layer]
        for layer in range(model.shape.layers)
        for block in model.family.blocks
    }
    with progress.layers(f"scoring with {metric}", len(own_layers)) as layers:
        own_scores = score(model, metric, batches, recipe.seed, own_layers, layers, ranks)
        tensors = ranks.merge(own_scores, sizes)
    for name, values in tensors.items():
        if not values.isfinite().all():
            raise RunError(f"{name}: the metric {metric} returned NaN or infinity. Try dtype float32 or bfloat16.")
    return Scores(tensors, metric, fingerprint, model.shape.unit_counts)


def load_or_compute_scores(context: SearchContext) -> Scores:
    """Return the scores in the run directory, or compute and save them. Raises UserError if they fit another model."""
    run, ranks = context.run, context.ranks
    if not ranks.max((run / SCORES_FILE).exists()):  # every process has looked before one of them writes
        batches = scoring_batches(context.recipe, context.text)
        scores = compute_scores(
            context.recipe, context.model, batches, context.fingerprint, ranks=ranks, progress=context.progress
        )
        if ranks.is_writer:
            scores.save(run)
        return scores
    scores = Scores.load(run)
    refuse_other_scores(run, scores, context.fingerprint, context.recipe.model)
    return scores


def refuse_other_scores(run: Path, scores: Scores, fingerprint: str, model: str) -> None:
    """Raise UserError if the scores in a run directory belong to a model with another fingerprint than `model`'s."""
    if scores.fingerprint != fingerprint:
        raise UserError(
            f"{run / SCORES_FILE}: the scores belong to another model, not to {model}. Run `pgprune init-scores` "
            "again, or choose another directory with --out."
        )
