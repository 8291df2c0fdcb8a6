"""Which text each phase of a search reads."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pgprune_cli.console.progress import Progress
from pgprune_cli.data.tokens import check_vocabulary
from pgprune_cli.data.windows import CalibrationText, calibration_text, spread
from pgprune_cli.errors import UserError
from pgprune_cli.forward.curvature import curvature_windows
from pgprune_cli.model.loading import check_prunable, load_tokenizer, read_config
from pgprune_cli.model.source import Source
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.repair.least_squares import PASSES
from pgprune_cli.scores.metrics import CALIBRATED, NEEDS


def load_text(recipe: Recipe, source: Source, progress: Progress) -> CalibrationText:
    """The calibration text that a recipe asks for, tokenised for its model. Raises UserError for what cannot be pruned,
    too: before the model is loaded."""
    refuse_weight_format(recipe)
    check_prunable(source)
    wanted = recipe.calibration
    with progress.working(f"reading {wanted.corpus}"):
        tokenizer = load_tokenizer(source)
        text = calibration_text(wanted.corpus, tokenizer, wanted.windows, wanted.heldout, wanted.seqlen)
    if source.gguf is None:  # whose tokenizer is in the model's own file
        check_vocabulary(text.stream, wanted.corpus, read_config(source).vocab_size)
    return text


def refuse_weight_format(recipe: Recipe) -> None:
    """Raises UserError for what weights in 8 bits cannot do: have gradients, or run at the speed of an export."""
    kept = recipe.weight_format
    if kept != "full" and NEEDS.get(recipe.scores.metric) == "gradients":
        raise UserError(
            f"scores.metric: {recipe.scores.metric} takes gradients, which {kept} weights have not; "
            "set weight_format to full, or take a metric without, such as obs"
        )
    if kept == "fp8" and recipe.budget.measure == "latency":
        raise UserError(
            "budget.measure: a latency would be that of fp8 products, and exports have none; set weight_format to full or int8"
        )


def scoring_batches(recipe: Recipe, text: CalibrationText) -> list[Tensor]:
    """The windows that a calibrated metric reads, as many tokens at a time as the search has (and no more memory)."""
    windows = text.long_windows(recipe.scores.windows, recipe.scores.seqlen)
    return list(windows.split(max(1, recipe.calibration.batch * recipe.calibration.seqlen // windows.shape[1])))


REPAIR_TOKENS = 4096
"""Tokens of one forward pass of the repair, at least: few large products are quicker than many small ones."""


def repair_batches(recipe: Recipe, text: CalibrationText) -> list[Tensor]:
    """The windows that repair is fitted to, as many tokens at a time as the search has at least."""
    windows = spread(text.search, recipe.repair.windows)
    return list(windows.split(max(recipe.calibration.batch, REPAIR_TOKENS // windows.shape[1])))


def _reselects(recipe: Recipe) -> bool:
    """Whether the repair chooses the units: a search over widths has only said how many, one over units which."""
    return recipe.search.policy == "widths"


def calibration_forward_passes(recipe: Recipe, text: CalibrationText) -> int:
    """Passes over calibration text besides the search's, in batches of the search."""
    repaired = recipe.repair.method != "none"
    read: list[Tensor] = []
    if recipe.scores.metric in CALIBRATED:
        scoring = scoring_batches(recipe, text)
        read += scoring
        if NEEDS[recipe.scores.metric] == "covariance":
            read += curvature_windows(scoring)
    repairing = repair_batches(recipe, text)
    if recipe.search.policy == "widths":
        read += repairing + curvature_windows(repairing)
    if repaired:
        read += PASSES * repairing
    if repaired and _reselects(recipe):
        read += curvature_windows(repairing)
    return math.ceil(sum(map(Tensor.numel, read)) / (recipe.calibration.batch * recipe.calibration.seqlen))


def empty_text(recipe: Recipe) -> CalibrationText:
    """As many windows as the recipe reads at most, on the meta device: they have shapes and no tokens."""
    wanted = recipe.calibration

    def tokens(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int64, device="meta")

    stream = tokens(wanted.windows * wanted.seqlen)
    return CalibrationText(stream.view(-1, wanted.seqlen), tokens(wanted.heldout, wanted.seqlen), stream)
