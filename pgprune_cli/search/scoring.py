"""Scores of every unit, computed for a search."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from pgprune_cli.console.progress import Progress
from pgprune_cli.data.windows import CalibrationText
from pgprune_cli.distributed import Ranks
from pgprune_cli.errors import RunError, UserError
from pgprune_cli.model.prunable import Shape
from pgprune_cli.model.source import Source
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.run.layout import SCORES_FILE
from pgprune_cli.run.scores import Scores
from pgprune_cli.scores.metrics import CALIBRATED, score
from pgprune_cli.search.texts import scoring_batches


def compute_scores(
    recipe: Recipe,
    source: Source,
    model: nn.Module,
    text: CalibrationText | None,
    progress: Progress,
    ranks: Ranks,
) -> Scores:
    """Scores of a model that is loaded already, every world-th layer by each of the processes.

    `text` may be None for a metric without calibration.
    """
    metric = recipe.scores.metric
    batches: list[Tensor] = []
    if metric in CALIBRATED:
        assert text is not None, "the caller loads the text of a calibrated metric"
        batches = scoring_batches(recipe, text)
    shape = Shape.of(model)
    own = ranks.share(len(shape.channels))
    with progress.layers(f"scoring with {metric}", len(own)) as bar:
        sizes = {"attention": shape.kv_heads, "ffn": shape.channels}
        lengths = {
            f"layers.{index}.{name}": counts[index]
            for index in range(len(shape.channels))
            for name, counts in sizes.items()
        }
        found = score(model, metric, batches, recipe.seed, own, lambda _: bar.layer_done(), bar.batches_done)
        tensors = ranks.united(found, lengths)
    for name, values in tensors.items():
        if not values.isfinite().all():
            raise RunError(f"{name}: the metric {metric} gave NaN or infinity; try dtype float32 or bfloat16")
    return Scores(tensors, metric, source.fingerprint())


def scores_of(
    recipe: Recipe, run: Path, source: Source, model: nn.Module, text: CalibrationText, progress: Progress, ranks: Ranks
) -> Scores:
    """Those of the run where it has some. Raises UserError where they are another model's."""
    if not ranks.greatest((run / SCORES_FILE).exists()):  # all have looked before one writes
        scores = compute_scores(recipe, source, model, text, progress, ranks)
        if ranks.writer:
            scores.save(run)
        return scores
    scores = Scores.load(run)
    if scores.fingerprint != source.fingerprint():
        raise UserError(f"{run / SCORES_FILE}: scores of another model than {recipe.model}; run `pgprune init-scores`")
    return scores
