"""Which text each phase of a search reads.

| phase | reads |
|---|---|
| scoring | `scores.windows` windows of `scores.seqlen` tokens, spread over the search's part of the text |
| width table, repair | `repair.windows` windows of `calibration.seqlen` tokens |
| each step | `calibration.batch` windows of `calibration.seqlen` tokens |
| held-out evaluation | `calibration.heldout` windows, spread over the text, which nothing else reads |

With `calibration.bos`, each of these windows begins with the BOS token in place of one token of the text.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pgprune_cli.data.windows import Batches, CalibrationText, spread
from pgprune_cli.forward.curvature import curvature_windows
from pgprune_cli.forward.shards import SHARDS
from pgprune_cli.model.families import refuse_for_experts
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.repair.last_layers import fitted_layers, last_layers_batches
from pgprune_cli.repair.least_squares import PASSES
from pgprune_cli.scores.metrics import CALIBRATED, NEEDS

REPAIR_TOKENS = 4096
"""Tokens of one forward pass of the repair, at least: few large products are faster than many small ones."""


def refuse_unsupported(recipe: Recipe, model_type: str) -> None:
    """Raise UserError for settings that a model of this type does not support."""
    families, metric, method = recipe.units.families, recipe.scores.metric, recipe.repair.method
    refuse_for_experts(model_type, recipe.weight_format, metric, families, method)


def empty_text(recipe: Recipe) -> CalibrationText:
    """Return as many windows as the recipe reads at most, on the meta device: they have shapes and no tokens."""
    settings = recipe.calibration

    def tokens(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int64, device="meta")

    stream = tokens(settings.windows * settings.seqlen)
    return CalibrationText(stream.view(-1, settings.seqlen), tokens(settings.heldout, settings.seqlen), stream)


def scoring_batches(recipe: Recipe, text: CalibrationText) -> list[Tensor]:
    """Return the batches of a calibrated metric, none for other metrics.

    Each holds as many tokens as a step of the search, so that scoring needs no more memory.
    """
    if recipe.scores.metric not in CALIBRATED:
        return []
    windows = text.long_windows(recipe.scores.windows, recipe.scores.seqlen)
    tokens_per_step = recipe.calibration.batch * recipe.calibration.seqlen
    return list(windows.split(max(1, tokens_per_step // windows.shape[1])))


def repair_batches(recipe: Recipe, text: CalibrationText) -> list[Tensor]:
    """Return the batches that the width table and the repair are fitted to.

    Each is at least as large as a step's, unless there would be fewer than `SHARDS` of them to divide among processes.
    """
    windows = spread(text.search, recipe.repair.windows)
    size = max(recipe.calibration.batch, REPAIR_TOKENS // windows.shape[1])
    return list(windows.split(max(1, min(size, len(windows) // SHARDS))))


def step_batches(recipe: Recipe, text: CalibrationText) -> Batches:
    """Return the batches that the steps of the search read, shuffled by the recipe's seed."""
    return Batches(text.search, recipe.calibration.batch, recipe.seed)


def reselects(recipe: Recipe) -> bool:
    """Return whether the repair chooses the kept units again: a width search has only decided how many to keep."""
    return recipe.search.policy == "widths"


def calibration_forward_passes(recipe: Recipe, text: CalibrationText, model: PrunableModel) -> int:
    """Return the forward passes over calibration text besides those of the masks, in batches of the search.

    They are those of scores, width table and repair, and one of the dense model per step if the objective needs it.
    Passes through single blocks or the last layers, with which `repair.method: sublayer` fits them, are not passes
    through the model and do not count.
    """
    repairs = recipe.repair.method != "none"
    scoring = scoring_batches(recipe, text)
    batches: list[Tensor] = [*scoring]
    if NEEDS.get(recipe.scores.metric) == "covariance":
        batches += curvature_windows(scoring)
    repairing = repair_batches(recipe, text)
    if recipe.search.policy == "widths":
        batches += repairing + curvature_windows(repairing)
    if repairs:
        batches += PASSES * repairing
    if fitted_layers(model, recipe.repair.fitted_last_layers):
        batches += [repairing[index] for index in last_layers_batches(repairing)]
    passes = math.ceil(sum(map(Tensor.numel, batches)) / (recipe.calibration.batch * recipe.calibration.seqlen))
    return passes + (recipe.search.steps if recipe.search.objective != "loss" else 0)
