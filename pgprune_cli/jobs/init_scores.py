"""init-scores: one pass of a metric over the model, written to the run directory."""

from __future__ import annotations

from pathlib import Path

from pgprune_cli.console.progress import SILENT, Progress
from pgprune_cli.distributed import Ranks
from pgprune_cli.model.loading import load_prunable
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.run.lock import locked
from pgprune_cli.run.provenance import record_command
from pgprune_cli.run.scores import Scores
from pgprune_cli.scores.metrics import CALIBRATED
from pgprune_cli.search.checks import SCORING_CHECKS, run_checks
from pgprune_cli.search.preparation import Preparation
from pgprune_cli.search.scoring import compute_scores
from pgprune_cli.search.texts import scoring_batches


def init_scores(recipe: Recipe, run: Path, *, progress: Progress = SILENT) -> Scores:
    """Score the recipe's model with its metric and write the scores into `run`.

    Raises:
        UserError: the model, the text or the directory is refused; also if `run` holds a search of another recipe.
        RunError: a score is not finite.
    """
    preparation = Preparation(recipe, run, progress)
    run_checks(preparation, SCORING_CHECKS)
    recipe, source = preparation.recipe, preparation.source
    with locked(run):
        batches = scoring_batches(recipe, preparation.text) if recipe.scores.metric in CALIBRATED else []
        with progress.working(f"loading {recipe.model}"):
            model = load_prunable(source, recipe.dtype, recipe.device, recipe.weight_format)
        scores = compute_scores(recipe, model, batches, source.fingerprint(), ranks=Ranks(), progress=progress)
        record_command(run)  # before the scores: once they exist, this command has nothing left to do
        scores.save(run)
        return scores
