"""Does a search fit the memory that is free? It is asked before the weights are loaded, by `search` and by `doctor`."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from pgprune_cli.data.windows import CalibrationText
from pgprune_cli.distributed import ranks_of_this_machine
from pgprune_cli.errors import UserError
from pgprune_cli.estimate.placement import Need, need
from pgprune_cli.estimate.sizes import Sizes, Texts
from pgprune_cli.model.devices import emptiest, free_bytes
from pgprune_cli.model.loading import empty_prunable
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.search.checks import CHECKS, Check
from pgprune_cli.search.preparation import Preparation
from pgprune_cli.search.texts import empty_repair_batches, empty_sampled_batches, repair_batches, scoring_batches

LOWER = "Lower calibration.seqlen, set weight_format to int8 or use a smaller model."


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


def devices_for(preparation: Preparation) -> list[torch.device]:
    """Return the devices for the weights: those of the recipe; of `auto`, as few as suffice, the emptiest ones."""
    devices = preparation.devices
    if preparation.asked.device != "auto" or len(devices) == 1:
        return devices
    return _emptiest(devices, need_of(preparation))


def _emptiest(devices: Sequence[torch.device], needed: Need) -> list[torch.device]:
    return [devices[index] for index in emptiest([*map(free_bytes, devices)], needed.weights, needed.beside)]


def _memory(preparation: Preparation) -> str:
    needed, devices = need_of(preparation), preparation.devices
    if preparation.asked.device == "auto" and len(devices) > 1:
        devices = _emptiest(devices, needed)
    kind, free_host = devices[0].type, psutil.virtual_memory().available // ranks_of_this_machine().world_size
    if kind == "cpu":
        total = needed.weights + needed.beside + needed.host
        _refuse(total, free_host, "of main memory", LOWER)
        return f"needs up to {_gb(total)}, {_gb(free_host)} are free"
    _refuse(needed.host, free_host, "of main memory", "Lower calibration.windows or calibration.seqlen.")
    if kind != "cuda":
        return f"the free memory of {devices[0]} is not known"
    shared, free = needed.weights // len(devices), min(map(free_bytes, devices))
    names = ", ".join(map(str, devices))
    _refuse(shared + needed.least, free, f"on each of {names}", f"Use more devices (device: auto). {LOWER}")
    total = shared + needed.beside
    state = f"needs up to {_gb(total)} on each of {names}, {_gb(free)} are free"
    if total > free:
        state += ": it runs in smaller batches and solves equations on the CPU, which takes longer"
        preparation.progress.say(f"memory: the search {state}. {LOWER}")
    return state


def _refuse(needed: int, free: int, where: str, advice: str) -> None:
    if needed > free:
        raise UserError(f"memory: the search needs {_gb(needed)} {where}, but only {_gb(free)} are free. {advice}")


def _gb(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"


SEARCH_CHECKS: Sequence[Check] = (*CHECKS, Check("memory", _memory, "model", scoring=False))
"""All checks of a search in the order in which it makes them."""
