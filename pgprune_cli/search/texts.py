"""Which text each phase of a search reads.

| phase | reads |
|---|---|
| scoring | `scores.windows` windows of `scores.seqlen` tokens, spread over the search's part of the text |
| width table, repair | `repair.windows` windows of `calibration.seqlen` tokens |
| repair | also `repair.sampled_windows` windows of the same length, which the dense model writes |
| each step | `calibration.batch` windows of `calibration.seqlen` tokens |
| held-out evaluation | `calibration.heldout` windows, spread over the text, which nothing else reads |

With `calibration.bos`, each of these windows begins with the BOS token in place of one token of the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pgprune_cli.data.windows import Batches, CalibrationText, interleaved, spread
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
    stream = _without_tokens(settings.windows * settings.seqlen)
    heldout = _without_tokens(settings.heldout, settings.seqlen)
    return CalibrationText(stream.view(-1, settings.seqlen), heldout, stream)


def scoring_batches(recipe: Recipe, text: CalibrationText) -> list[Tensor]:
    """Return the batches of a calibrated metric, none for other metrics.

    Each holds as many tokens as a step of the search, so that scoring needs no more memory.
    """
    if recipe.scores.metric not in CALIBRATED:
        return []
    windows = text.long_windows(recipe.scores.windows, recipe.scores.seqlen)
    tokens_per_step = recipe.calibration.batch * recipe.calibration.seqlen
    return list(windows.split(max(1, tokens_per_step // windows.shape[1])))


def repair_batches(recipe: Recipe, text: CalibrationText, sampled: Sequence[Tensor] = ()) -> list[Tensor]:
    """Return the batches that the width table is fitted to, and, with the `sampled` ones among them, the repair."""
    windows = spread(text.search, recipe.repair.windows)
    return _in_batches(recipe, interleaved([windows, torch.cat(list(sampled))]) if sampled else windows)


def empty_sampled_batches(recipe: Recipe) -> list[Tensor]:
    """Return batches on the meta device like those that the dense model will write for the repair."""
    windows = recipe.repair.sampled_windows if recipe.repair.method != "none" else 0
    return _in_batches(recipe, _without_tokens(windows, recipe.calibration.seqlen)) if windows else []


def empty_repair_batches(recipe: Recipe, text: CalibrationText) -> list[Tensor]:
    """Return batches like those of the repair, on the meta device if the dense model has to write some of them."""
    if not (sampled := empty_sampled_batches(recipe)):
        return repair_batches(recipe, text)
    windows = min(len(text.search), recipe.repair.windows) + sum(map(len, sampled))
    return _in_batches(recipe, _without_tokens(windows, recipe.calibration.seqlen))


def _without_tokens(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.int64, device="meta")


def _in_batches(recipe: Recipe, windows: Tensor) -> list[Tensor]:
    """Split windows `(N, T)` into batches.

    Each is at least as large as a step's, unless there would be fewer than `SHARDS` of them to divide among processes.
    """
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

    They are those of scores, width table and repair, one for the text that the dense model writes, and one of the dense
    model per step if the objective needs it. Passes through single blocks or the last layers, with which
    `repair.method: sublayer` fits them, are not passes through the model and do not count.
    """
    repairs = recipe.repair.method != "none"
    scoring = scoring_batches(recipe, text)
    batches: list[Tensor] = [*scoring]
    if NEEDS.get(recipe.scores.metric) == "covariance":
        batches += curvature_windows(scoring)
    table, repairing = repair_batches(recipe, text), empty_repair_batches(recipe, text)
    sampled = empty_sampled_batches(recipe)
    if recipe.search.policy == "widths":
        batches += table + curvature_windows(table)
    if repairs:
        batches += sampled + PASSES * repairing
    if sampled and reselects(recipe):
        batches += curvature_windows(repairing)
    if fitted_layers(model, recipe.repair.fitted_last_layers):
        batches += [repairing[index] for index in last_layers_batches(repairing)]
    passes = math.ceil(sum(map(Tensor.numel, batches)) / (recipe.calibration.batch * recipe.calibration.seqlen))
    return passes + (recipe.search.steps if recipe.search.objective != "loss" else 0)
