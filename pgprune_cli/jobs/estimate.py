"""search --dry-run and recover --dry-run: what they would take, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from pgprune_cli.console.progress import SILENT, Progress
from pgprune_cli.distributed import ranks_from_environment
from pgprune_cli.errors import UserError
from pgprune_cli.estimate.flops import Flops, seconds
from pgprune_cli.estimate.machines import Machine, gpu
from pgprune_cli.estimate.matmul_rate import matmul_rate
from pgprune_cli.estimate.measured import memory_rate, pcie_rate
from pgprune_cli.estimate.memory import Memory, memory
from pgprune_cli.estimate.passes import all_on_device
from pgprune_cli.estimate.phases import phases
from pgprune_cli.estimate.placement import Placement, need, place, setup
from pgprune_cli.estimate.recovery import RecoverySizes, recovery_disk, recovery_flops, recovery_memory
from pgprune_cli.estimate.sizes import Sizes, Texts
from pgprune_cli.estimate.work import phase_seconds
from pgprune_cli.jobs.memory import texts_of
from pgprune_cli.jobs.recovery_request import device_of
from pgprune_cli.model.devices import devices_of, fastest_dtype, free_bytes
from pgprune_cli.model.loading import WeightFormat, empty_prunable, stored_dtype
from pgprune_cli.model.source import resolve
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.recover.checks import check_pair, find_teacher
from pgprune_cli.recover.student import loaded_dtype
from pgprune_cli.search.checks import ESTIMATE_CHECKS, run_checks
from pgprune_cli.search.preparation import Preparation
from pgprune_cli.search.texts import calibration_forward_passes, empty_text, refuse_unsupported

BASIS = (
    "These are estimates from the shapes of the model and the recipe, for a corpus with as much text as the recipe "
    "reads at most. Rates of the disk and of the host are assumed. Downloads and what processes send each other are "
    "not counted. "
)
HERE = "The device's rates were just measured. If other work keeps the machine busy, they mean little."
ELSEWHERE = "The GPU's rates are fractions of its data sheet: nothing was measured."

MOST_GPUS = 64
"""The estimate recommends no larger number of GPUs."""


def estimate(recipe: Recipe, *, on: str | None = None, gpus: int = 1, progress: Progress = SILENT) -> dict[str, Any]:
    """Return memory in bytes, forward passes, FLOPs and seconds of a search. Reads no weights and no text.

    on: a GPU of the table in estimate/machines.py, of which there are `gpus`; by default the recipe's device on this
    machine, whose rates are measured. Raises UserError for whatever the search would be refused for, as far as the
    model's config shows it, and for a GPU that is not in the table.
    """
    elsewhere = None if on is None else gpu(on)
    if elsewhere is not None:  # nothing depends on this machine's devices
        recipe = replace(recipe, device="cpu", dtype="bfloat16" if recipe.dtype == "fastest" else recipe.dtype)
    preparation = Preparation(recipe, progress=progress)
    run_checks(preparation, ESTIMATE_CHECKS)
    recipe, text = preparation.recipe, empty_text(preparation.recipe)
    sizes, texts = _sizes(preparation, recipe.weight_format), texts_of(recipe, text)
    placement: dict[str, Any] = {}
    if elsewhere is None:
        shared_by, processes, room = len(preparation.devices), ranks_from_environment().world_size, _room(preparation)
    else:
        placed = place(need(sizes, texts), elsewhere.memory, gpus, recipe.search.masks_per_step)
        shared_by, processes, room = placed.gpus, placed.processes, elsewhere.memory
        placement = {"placement": vars(placed) | {"advice": _advice(preparation, texts, placed, elsewhere, gpus)}}
    own_setup = setup(sizes, texts, room, shared_by, processes)
    works = phases(sizes, texts, own_setup)
    flops = {name: count for name, parts in works.items() if (count := sum((part.flops for part in parts), Flops()))}
    dtypes = list(dict.fromkeys(dtype for part in flops.values() for dtype in part))
    machine = elsewhere or _measured(preparation.devices[0], dtypes, progress)
    times, needed, settings = phase_seconds(works, machine), memory(sizes, texts), recipe.search
    return {
        "model": preparation.given.model,
        "parameters": sizes.parameters,
        "dtype": _name(sizes.dtype),
        "device": on or _device_name(preparation.devices),
        **placement,
        "memory": _memory(needed, on_device=room is not None and all_on_device(sizes, texts, own_setup)),
        "forward_passes": {
            "search": settings.steps * settings.masks_per_step,
            "calibration": calibration_forward_passes(recipe, text, sizes.model),
            "tokens": texts.step.numel(),
        },
        "flops": {name: {_name(dtype): count for dtype, count in part.items()} for name, part in flops.items()},
        "flops_per_second": {_name(dtype): machine.flops_per_second[dtype] for dtype in dtypes},
        "phases": times,
        "seconds": sum(phase["seconds"] for phase in times.values()),
        "basis": BASIS + (HERE if on is None else ELSEWHERE),
    }


def _memory(needed: Memory, *, on_device: bool) -> dict[str, Any]:
    """Return the bytes, with the hidden states where they are: on a device that has room for them or on the host."""
    host = needed.host - needed.hidden_states if on_device else needed.host
    return vars(needed) | {"device": needed.device, "host": host, "hidden_states_on_device": on_device}


def _sizes(preparation: Preparation, weight_format: WeightFormat) -> Sizes:
    recipe = replace(preparation.recipe, weight_format=weight_format)
    return Sizes(empty_prunable(preparation.config_source, recipe.dtype, weight_format), recipe)


def _room(preparation: Preparation) -> int | None:
    """Return the free bytes of the fullest of the devices, None if they are not GPUs."""
    devices = preparation.devices
    return min(map(free_bytes, devices)) if devices[0].type == "cuda" else None


def _measured(device: torch.device, dtypes: Sequence[torch.dtype], progress: Progress) -> Machine:
    with progress.working(f"measuring {device}"):
        return Machine(
            {dtype: matmul_rate(device, dtype) for dtype in dtypes},
            memory_rate(device),
            pcie_rate(device) if device.type == "cuda" else None,
        )


def _advice(preparation: Preparation, texts: Texts, placed: Placement, machine: Machine, gpus: int) -> str:
    """Return what makes a search fit as a whole that does not, "" if it does."""
    if placed.fits == "whole":
        return ""
    recipe, most = preparation.recipe, preparation.recipe.search.masks_per_step
    if recipe.weight_format == "full":
        with suppress(UserError):  # the weights of experts cannot be rounded
            rounded = replace(recipe, weight_format="int8")
            refuse_unsupported(rounded, preparation.empty.config.model_type)
            if place(need(_sizes(preparation, "int8"), texts), machine.memory, gpus, most).fits == "whole":
                return "Set weight_format to int8."
    needed = need(_sizes(preparation, recipe.weight_format), texts)
    count = next(
        (n for n in range(gpus + 1, MOST_GPUS + 1) if place(needed, machine.memory, n, most).fits == "whole"), 0
    )
    return f"Use {count} GPUs." if count else "Use GPUs with more memory."


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
    Raises UserError if one of the two is not there or cannot be used, if they do not fit each other, or if the machine
    does not have the device.
    """
    student, settings = resolve(model, weights=False), recipe.recover
    dense = find_teacher(student, teacher)
    pair, device, dtype = check_pair(student, dense, settings), device_of(recipe), fastest_dtype(recipe.device)
    sizes = RecoverySizes(
        empty_prunable(student, loaded_dtype(settings.train, bfloat16=dtype == "bfloat16")),
        empty_prunable(dense, dtype),
        settings,
        ranks_from_environment().world_size,
        getattr(torch, dtype),
        on_cpu=device.type == "cpu",
        teacher_apart=len(devices_of(recipe.device)) > 1,
    )
    parts = recovery_flops(sizes)
    with progress.working(f"measuring matrix products on {device}"):
        rates = {dtype: matmul_rate(device, dtype) for part in parts.values() for dtype in part}
    needed, schedule = recovery_memory(sizes), sizes.schedule
    return {
        "model": model,
        "teacher": dense.name,
        "parameters": sum(parameter.numel() for parameter in sizes.student.module.parameters()),
        "trained_parameters": sizes.trained,
        "dtype": dtype,
        "device": _device_name([device]),
        "memory": vars(needed) | {"device": needed.device},
        "disk": recovery_disk(sizes, stored_dtype(pair.config)),
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
