"""search --dry-run and recover --dry-run: what they would take, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pgprune_cli.console.progress import SILENT, Progress
from pgprune_cli.distributed import ranks_from_environment
from pgprune_cli.estimate.flops import flops, seconds
from pgprune_cli.estimate.matmul_rate import matmul_rate
from pgprune_cli.estimate.memory import memory
from pgprune_cli.estimate.recovery import RecoverySizes, recovery_disk, recovery_flops, recovery_memory
from pgprune_cli.estimate.sizes import Sizes, Texts
from pgprune_cli.model.context import refuse_longer_windows
from pgprune_cli.model.devices import devices_of, fastest_dtype
from pgprune_cli.model.loading import empty_prunable
from pgprune_cli.model.source import resolve
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.recover.checks import find_teacher
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


RECOVERY_BASIS = (
    "These are estimates from the shapes of the two models and the recipe. What an allocator wastes and what CUDA "
    "itself takes come on top of the memory. The time is that of the matrix products alone, at the rates just measured "
    "on this machine, so the recovery takes longer. If other work keeps the machine busy, the rates mean little."
)


def estimate_recovery(
    model: str, recipe: Recipe, teacher: str | None = None, *, progress: Progress = SILENT
) -> dict[str, Any]:
    """Return memory and disk in bytes, tokens, FLOPs and seconds of a recovery. Reads no weights and no text.

    model: the directory of the student; teacher: the dense model, if not the one that the student was pruned from.
    Raises UserError if one of the two is not there or cannot be used, or if the machine does not have the device.
    """
    student, settings = resolve(model, weights=False), recipe.recover
    dense = find_teacher(student, teacher)
    devices, dtype = devices_of(recipe.device), fastest_dtype(recipe.device)
    frozen = settings.train != "all" and dtype == "bfloat16"  # then what is not trained is loaded as it is stored
    sizes = RecoverySizes(
        empty_prunable(student, "auto" if frozen else "float32"),
        empty_prunable(dense, dtype),
        settings,
        ranks_from_environment().world_size,
        getattr(torch, dtype),
    )
    refuse_longer_windows(sizes.student.config, model, {"recover.seqlen": settings.seqlen})
    parts = recovery_flops(sizes)
    with progress.working(f"measuring matrix products on {devices[0]}"):
        rates = {dtype: matmul_rate(devices[0], dtype) for part in parts.values() for dtype in part}
    needed, schedule = recovery_memory(sizes), sizes.schedule
    return {
        "model": model,
        "teacher": dense.name,
        "parameters": sum(parameter.numel() for parameter in sizes.student.module.parameters()),
        "trained_parameters": sizes.trained,
        "dtype": dtype,
        "device": _device_name(devices[:1]),
        "memory": vars(needed) | {"device": needed.device},
        "disk": recovery_disk(sizes),
        "tokens": schedule.steps * sizes.step_tokens,
        "steps": schedule.steps,
        "flops": {name: {_name(dtype): count for dtype, count in part.items()} for name, part in parts.items()},
        "flops_per_second": {_name(dtype): rate for dtype, rate in rates.items()},
        "seconds": seconds(parts, rates) / sizes.processes,
        "basis": RECOVERY_BASIS,
    }


def _device_name(devices: Sequence[torch.device]) -> str:
    """Return what the devices that share the weights are called. All are of the first one's kind."""
    name = torch.cuda.get_device_name(devices[0]) if devices[0].type == "cuda" else str(devices[0])
    return name if len(devices) == 1 else f"up to {len(devices)} × {name} together"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
