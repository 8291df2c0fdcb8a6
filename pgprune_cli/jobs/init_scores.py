"""init-scores: one pass of a metric over the model, written to `scores.safetensors` of the run."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from pgprune_cli.console.progress import through_layers, working
from pgprune_cli.data.corpora import CalibrationText, calibration_text, check_vocabulary
from pgprune_cli.distributed import Ranks
from pgprune_cli.errors import RunError, UserError
from pgprune_cli.model.loading import check_prunable, load_model, load_tokenizer, read_config
from pgprune_cli.model.prunable import Shape
from pgprune_cli.model.source import Source, resolve
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.run.lock import locked
from pgprune_cli.run.provenance import note
from pgprune_cli.run.scores import Scores
from pgprune_cli.scores.metrics import CALIBRATED, NEEDS, score


def init_scores(recipe: Recipe, run: Path, quiet: bool = False) -> Scores:
    """Scores the recipe's model with its metric and writes them into `run`. Raises UserError, RunError."""
    with locked(run):
        source = resolve(recipe.model)
        text = None
        if recipe.saliency.metric in CALIBRATED:
            text = load_text(recipe, source, quiet)
        with working(f"loading {recipe.model}", quiet):
            model = load_model(source, recipe.dtype, recipe.device, recipe.weights)
        scores = compute_scores(recipe, source, model, text, quiet, Ranks())
        note(run)  # before the scores: who finds those does not come here again
        scores.save(run)
        return scores


def load_text(recipe: Recipe, source: Source, quiet: bool) -> CalibrationText:
    """The calibration text that a recipe asks for, tokenised for its model. Raises UserError for what cannot be pruned,
    too: before the model is loaded."""
    refuse_unfit_weights(recipe)
    check_prunable(source)
    wanted = recipe.calibration
    with working(f"reading {wanted.corpus}", quiet):
        tokenizer = load_tokenizer(source)
        text = calibration_text(wanted.corpus, tokenizer, wanted.sequences, wanted.heldout, wanted.seqlen)
    if source.gguf is None:  # whose tokenizer is in the model's own file
        check_vocabulary(text.stream, wanted.corpus, read_config(source).vocab_size)
    return text


def refuse_unfit_weights(recipe: Recipe) -> None:
    """Raises UserError for what weights in 8 bits cannot do: have gradients, or run at the speed of an export."""
    kept = recipe.weights
    if kept != "dtype" and NEEDS.get(recipe.saliency.metric) == "gradients":
        raise UserError(
            f"saliency.metric: {recipe.saliency.metric} takes gradients, which {kept} weights have not; "
            "set weights to dtype, or take a metric without, such as obs"
        )
    if kept == "fp8" and recipe.budget.of == "latency":
        raise UserError(
            "budget.of: a latency would be that of fp8 products, and exports have none; set weights to dtype or int8"
        )


def scoring_batches(recipe: Recipe, text: CalibrationText) -> list[Tensor]:
    """The windows that a calibrated metric reads, as many tokens at a time as the search has (and no more memory)."""
    windows = text.long_windows(recipe.saliency.sequences, recipe.saliency.seqlen)
    return list(windows.split(max(1, recipe.calibration.batch * recipe.calibration.seqlen // windows.shape[1])))


def compute_scores(
    recipe: Recipe,
    source: Source,
    model: nn.Module,
    text: CalibrationText | None,
    quiet: bool,
    ranks: Ranks,
) -> Scores:
    """Scores of a model that is loaded already, every world-th layer by each of the processes.

    `text` may be None for a metric without calibration.
    """
    metric = recipe.saliency.metric
    batches: list[Tensor] = []
    if metric in CALIBRATED:
        assert text is not None, "the caller loads the text of a calibrated metric"
        batches = scoring_batches(recipe, text)
    shape = Shape.of(model)
    own = ranks.share(len(shape.channels))
    with through_layers(f"scoring with {metric}", len(own), quiet) as bar:
        sizes = {"attention": shape.kv_groups, "ffn": shape.channels}
        lengths = {
            f"layers.{index}.{name}": counts[index]
            for index in range(len(shape.channels))
            for name, counts in sizes.items()
        }
        found = score(model, metric, batches, recipe.seed, own, bar.on_more, bar.on_batches)
        tensors = ranks.united(found, lengths)
    for name, values in tensors.items():
        if not values.isfinite().all():
            raise RunError(f"{name}: the metric {metric} gave NaN or infinity; try dtype float32 or bfloat16")
    return Scores(tensors, metric, source.fingerprint())
