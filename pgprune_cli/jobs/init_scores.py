"""init-scores: one pass of a metric over the model, written to the run directory."""

from __future__ import annotations

from pathlib import Path

from pgprune_cli.console.progress import SILENT, Progress
from pgprune_cli.distributed import Ranks
from pgprune_cli.model.loading import check_prunable, load_prunable
from pgprune_cli.model.source import resolve
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.run.lock import locked
from pgprune_cli.run.provenance import record_command
from pgprune_cli.run.scores import Scores
from pgprune_cli.run.settled import settled
from pgprune_cli.scores.metrics import CALIBRATED
from pgprune_cli.search.scoring import compute_scores
from pgprune_cli.search.texts import load_text, scoring_batches


def init_scores(recipe: Recipe, run: Path, *, progress: Progress = SILENT) -> Scores:
    """Score the recipe's model with its metric and write the scores into `run`. Raises UserError, RunError."""
    recipe = settled(recipe, run)
    with locked(run):
        source = resolve(recipe.model)
        check_prunable(source, recipe.units.families)
        batches = []
        if recipe.scores.metric in CALIBRATED:
            batches = scoring_batches(recipe, load_text(recipe, source, progress))
        with progress.working(f"loading {recipe.model}"):
            model = load_prunable(source, recipe.dtype, recipe.device, recipe.weight_format)
        scores = compute_scores(recipe, model, batches, source.fingerprint(), ranks=Ranks(), progress=progress)
        record_command(run)  # before the scores: once they exist, this command has nothing left to do
        scores.save(run)
        return scores
