"""Check that a search fits the free memory, before its weights are loaded.

`search`, `compare` and `doctor` make this check.
"""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from pgprune_cli.data.windows import CalibrationText
from pgprune_cli.distributed import ranks_of_this_machine
from pgprune_cli.errors import UserError
from pgprune_cli.estimate.placement import Need, need
from pgprune_cli.estimate.sizes import Sizes, Texts
from pgprune_cli.jobs.machine import gigabytes
from pgprune_cli.model.devices import emptiest, free_bytes
from pgprune_cli.model.families import can_be_rounded
from pgprune_cli.model.loading import empty_prunable
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.search.checks import CHECKS, Check
from pgprune_cli.search.preparation import Preparation
from pgprune_cli.search.texts import empty_repair_batches, empty_sampled_batches, repair_batches, scoring_batches


def need_of(preparation: Preparation) -> Need:
    """Return what the search needs with the text that it will read. Raises UserError if there is no such search."""
    recipe = preparation.recipe
    sizes = Sizes(empty_prunable(preparation.config_source, recipe.dtype, recipe.weight_format), recipe)
    return need(sizes, texts_of(recipe, preparation.text))


def texts_of(recipe: Recipe, text: CalibrationText) -> Texts:
    """Return what a search reads of its text."""
    step = text.search[: recipe.calibration.batch]
    return Texts(
        scoring_batches(recipe, text),
        repair_batches(recipe, text),
        empty_repair_batches(recipe, text),
        step,
        text.heldout,
        empty_sampled_batches(recipe),
    )


def devices_for(preparation: Preparation, needed: Need) -> list[torch.device]:
    """Return the devices for the weights: those of the recipe, or for `auto` the emptiest GPUs, as few as suffice."""
    devices = preparation.devices
    if preparation.asked.device != "auto" or len(devices) == 1:
        return devices
    return [devices[index] for index in emptiest([*map(free_bytes, devices)], needed.weights, needed.beside)]


def _memory(preparation: Preparation) -> str:
    needed = need_of(preparation)
    devices = devices_for(preparation, needed)
    kind, free_host = devices[0].type, psutil.virtual_memory().available // ranks_of_this_machine().world_size
    advice = _advice(preparation)
    if kind == "cpu":
        total = needed.weights + needed.beside + needed.host
        _refuse(total, free_host, "of main memory", advice)
        return f"needs up to {gigabytes(total)}, and {gigabytes(free_host)} are free"
    _refuse(needed.host, free_host, "of main memory", "Lower calibration.windows or calibration.seqlen.")
    if kind != "cuda":
        return f"the free memory of {devices[0]} is not known"
    shared, free = needed.weights // len(devices), min(map(free_bytes, devices))
    several = len(devices) > 1
    where = f"on {'each of ' if several else ''}{', '.join(map(str, devices))}"
    _refuse(shared + needed.least, free, where, f"Use more devices (device: auto). {advice}")
    total = shared + needed.beside
    state = f"needs up to {gigabytes(total)} {where}, where {'at least ' if several else ''}{gigabytes(free)} are free"
    if total > free:
        state += ": it runs in smaller batches and solves equations on the CPU, which takes longer"
        preparation.progress.say(f"memory: the search {state}. {advice}")
    return state


def _advice(preparation: Preparation) -> str:
    """Return how to need less memory. int8 is named only if it would change something and the model supports it."""
    full = preparation.recipe.weight_format == "full"
    rounded = full and can_be_rounded(preparation.empty.config.model_type)
    return f"Lower calibration.seqlen{', set weight_format to int8' if rounded else ''} or use a smaller model."


def _refuse(needed: int, free: int, where: str, advice: str) -> None:
    if needed > free:
        raise UserError(
            f"memory: the search needs {gigabytes(needed)} {where}, but only {gigabytes(free)} are free. {advice}"
        )


SEARCH_CHECKS: Sequence[Check] = (*CHECKS, Check("memory", _memory, "model", scoring=False))
"""All checks of a search in the order in which it makes them."""
