"""Which devices a model is on: those of this process, how many its weights need, and which layer is where."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch.torch_version import TorchVersion

from pgprune_cli.distributed import ranks_of_this_machine
from pgprune_cli.errors import UserError
from pgprune_cli.model.families.adapter import ModelFamily

GPU = "cuda"
"""The kind of the devices that a model runs on besides the CPU."""

BESIDE = 0.25
"""What is needed on a GPU beside the weights, as a fraction of them, if the caller gives no estimate."""

RESERVE = 0.05
"""The fraction of a GPU that is left free: allocators waste some memory, and libraries allocate late."""


def devices_of(device: str) -> list[torch.device]:
    """Return the devices that a recipe's `device` names; under torchrun, this process's share of the GPUs.

    `auto` names all GPUs, `cuda` the first of them. Raises UserError for devices that this machine does not have.
    """
    if device == "auto" and not torch.cuda.is_available():
        return [torch.device("cpu")]
    count = torch.cuda.device_count()
    if device in ("auto", "cuda") and count:
        gpus = _share_of_process([torch.device("cuda", index) for index in range(count)])
        return gpus if device == "auto" else gpus[:1]
    names = [name.strip() for name in device.split(",")]
    numbered = rf"{GPU}:(0|[1-9][0-9]?)"  # torch.device takes cuda:256 for cuda:0
    is_known = re.fullmatch(rf"cpu|{GPU}|{numbered}(,{numbered})*", ",".join(names))
    if not is_known or len(set(names)) < len(names):
        raise UserError(
            f"device: {device!r} is not a device. Expected auto, cpu, cuda, cuda:N or a list such as cuda:0,cuda:1."
        )
    devices = [torch.device(name) for name in names]
    for gpu in devices:
        if gpu.type == "cuda" and (gpu.index or 0) >= count:
            raise UserError(f"device: {gpu} does not exist, this machine has {_cuda_devices(count)}. Choose another.")
    return _share_of_process(devices) if devices[0].type == "cuda" else devices


def unusable_gpu() -> str | None:
    """Return why PyTorch cannot use the NVIDIA GPU of this machine and what to do. None if it can, or there is none."""
    driver = Path("/proc/driver/nvidia/version")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not (shutil.which("nvidia-smi") or driver.exists()):
        return None  # hidden on purpose, or no driver
    with warnings.catch_warnings():  # PyTorch warns of an old driver in words of its own
        warnings.simplefilter("ignore")
        if torch.cuda.is_available():
            return None
    version = torch.version.cuda
    reason = (
        f"is built for CUDA {version}, and the driver is too old for it or shows no GPU"
        if version
        else "is built without CUDA"
    )
    return (
        f"this machine has an NVIDIA driver, but torch {torch.__version__} {reason}, so the CPU computes. "
        "Install the torch build for your driver: https://pytorch.org/get-started (docs/scale.md has a table)."
    )


def _share_of_process(gpus: list[torch.device]) -> list[torch.device]:
    """Return the GPUs that belong to this process: all of them, unless torchrun started several.

    Then process r has r and every later one at the distance of their number, so that its first GPU is the one that
    accelerate trains on.
    """
    ranks = ranks_of_this_machine()
    if ranks.world_size > len(gpus):
        raise UserError(
            f"torchrun: {ranks.world_size} processes on this machine, but only {_cuda_devices(len(gpus))}. "
            "Start fewer processes."
        )
    return gpus[ranks.rank :: ranks.world_size]


def has_bfloat16_products(device: torch.device) -> bool:
    """Return whether a device has instructions for products of bfloat16 matrices, and PyTorch for their float32 sums.

    A CPU rounds the sums to bfloat16.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False) and TorchVersion(torch.__version__) >= "2.8"
    return device.type == "cpu" and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def fastest_dtype(device: str) -> Literal["bfloat16", "float32"]:
    """Return the dtype in which a recipe's `device` computes fastest: bfloat16 if it has instructions for it.

    Other CPUs compute five times as fast in float32. Raises UserError for devices that this machine does not have.
    """
    first = devices_of(device)[0]
    if first.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if has_bfloat16_products(first) else "float32"


def _cuda_devices(count: int) -> str:
    return "1 CUDA device" if count == 1 else f"{count} CUDA devices"


def free_bytes(device: torch.device) -> int:
    """Return the free bytes of a GPU, with those that this process has reserved and does not use."""
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + reserved


def room_beside(device: torch.device, needed: int) -> int:
    """Return the free bytes of a GPU besides `needed` ones and a reserve. 0 if there are none."""
    reserve = round(RESERVE * torch.cuda.mem_get_info(device)[1])
    return max(free_bytes(device) - needed - reserve, 0)


def emptiest(free: Sequence[int], weights: int, beside: int | None = None) -> list[int]:
    """Return which devices to use, by ascending index: the emptiest ones, as few as suffice, or all of them.

    free: bytes of each device; weights: bytes, spread evenly over the devices; beside: bytes that each device needs for
    everything else, by default a fraction of the weights.
    """
    beside = round(BESIDE * weights) if beside is None else beside
    ranked = sorted(range(len(free)), key=lambda index: -free[index])
    for count in range(1, len(free) + 1):
        if weights / count + beside <= free[ranked[count - 1]]:
            return sorted(ranked[:count])
    return sorted(ranked)


def device_map(family: ModelFamily, layers: int, tied: bool, devices: list[torch.device]) -> dict[str, torch.device]:
    """Return a device by module path: equal runs of layers in order, the embedding first and the head last.

    tied: embedding and head are one tensor, which then is where the head is.
    """
    by_layer = {f"{family.layers}.{i}": devices[i * len(devices) // layers] for i in range(layers)}
    return by_layer | {
        family.embedding: devices[-1 if tied else 0],
        family.rotary: devices[0],
        family.final_norm: devices[-1],
        family.head: devices[-1],
    }


def memory_in_use() -> int:
    """Return bytes: the peak of the memory allocated on all GPUs if any is used, else what this process uses now."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    return int(psutil.Process().memory_info().rss)
