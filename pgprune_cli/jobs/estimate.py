"""search --dry-run: what a search would take, from the model's config and the recipe, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pgprune_cli.console.progress import SILENT, Progress
from pgprune_cli.estimate.flops import flops, seconds
from pgprune_cli.estimate.matmul_rate import matmul_rate
from pgprune_cli.estimate.memory import memory
from pgprune_cli.estimate.sizes import Sizes, Texts
from pgprune_cli.model.loading import empty_prunable
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.search.checks import ESTIMATE_CHECKS, run_checks
from pgprune_cli.search.preparation import Preparation
from pgprune_cli.search.texts import calibration_forward_passes, empty_text, repair_batches, scoring_batches

BASIS = (
    "These are estimates from the shapes of the model and the recipe, for a corpus with as much text as the recipe "
    "reads at most. The time is that of the matrix products alone, at the rates just measured on this machine, so the "
    "search takes longer. If other work keeps the machine busy, the rates mean little."
)


def estimate(recipe: Recipe, *, progress: Progress = SILENT) -> dict[str, Any]:
    """Return memory in bytes, forward passes, FLOPs and seconds of a search. Reads no weights and no text.

    Raises UserError for whatever the search would be refused for, as far as the model's config shows it.
    """
    preparation = Preparation(recipe, progress=progress)
    run_checks(preparation, ESTIMATE_CHECKS)
    devices, recipe = preparation.devices, preparation.recipe
    model = empty_prunable(preparation.config_source, recipe.dtype, recipe.weight_format)
    sizes = Sizes(model, recipe)
    text = empty_text(recipe)
    step = text.search[: recipe.calibration.batch]
    texts = Texts(scoring_batches(recipe, text), repair_batches(recipe, text), step, text.heldout)
    parts = flops(sizes, texts)
    with progress.working(f"measuring matrix products on {devices[0]}"):
        rates = {dtype: matmul_rate(devices[0], dtype) for part in parts.values() for dtype in part}
    needed = memory(sizes, texts)
    settings = recipe.search
    return {
        "model": preparation.given.model,
        "parameters": sizes.parameters,
        "dtype": _name(sizes.dtype),
        "device": _device_name(devices),
        "memory": vars(needed) | {"device": needed.device, "host": needed.host},
        "forward_passes": {
            "search": settings.steps * settings.masks_per_step,
            "calibration": calibration_forward_passes(recipe, text),
            "tokens": step.numel(),
        },
        "flops": {name: {_name(dtype): count for dtype, count in part.items()} for name, part in parts.items()},
        "flops_per_second": {_name(dtype): rate for dtype, rate in rates.items()},
        "seconds": seconds(parts, rates),
        "basis": BASIS,
    }


def _device_name(devices: Sequence[torch.device]) -> str:
    """Return what the devices that share the weights are called. All are of the first one's kind."""
    name = torch.cuda.get_device_name(devices[0]) if devices[0].type == "cuda" else str(devices[0])
    return name if len(devices) == 1 else f"up to {len(devices)} × {name} together"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
