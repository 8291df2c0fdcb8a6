"""On which devices a model lies: which are this process's, how many of them its weights need, which layer is where."""

from __future__ import annotations

import torch

from pgprune_cli.distributed import on_this_machine
from pgprune_cli.errors import UserError

FILLED = 0.8
"""Of a GPU's free memory that weights may take where `device: auto` chooses: the rest is for what a forward needs."""


def devices_of(device: str) -> list[torch.device]:
    """The devices that a recipe's `device` names; of GPUs, under torchrun, this process's share of them.

    `auto` names all GPUs, `cuda` the first of them. Raises UserError for devices that this machine lacks.
    """
    if device == "auto" and not torch.cuda.is_available():
        return [torch.device("cpu")]
    count = torch.cuda.device_count()
    if device in ("auto", "cuda") and count:
        devices = _shared([torch.device("cuda", index) for index in range(count)])
        return devices if device == "auto" else devices[:1]
    try:
        devices = [torch.device(name.strip()) for name in device.split(",")]
    except RuntimeError:
        raise UserError(
            f"device {device!r}: expected auto, cpu, cuda, cuda:N or a list such as cuda:0,cuda:1"
        ) from None
    for wanted in devices:
        if wanted.type == "cuda" and (wanted.index or 0) >= count:
            raise UserError(f"device {wanted}: this machine has {count} CUDA devices")
    return _shared(devices) if devices[0].type == "cuda" else devices


def _shared(devices: list[torch.device]) -> list[torch.device]:
    """Of GPUs the run of them that is this process's; all are, of one process alone."""
    here = on_this_machine()
    if here.world > len(devices):
        raise UserError(f"{here.world} processes on this machine and {len(devices)} CUDA devices for them; start fewer")
    return devices[here.rank * len(devices) // here.world : (here.rank + 1) * len(devices) // here.world]


def enough(weights: int, free: list[int]) -> int:
    """How many devices, of so many free bytes each, that many bytes of weights need when spread evenly; at most all."""
    counts = range(1, len(free) + 1)
    return next((count for count in counts if weights <= FILLED * count * min(free[:count])), len(free))


def spread(layers: int, tied: bool, devices: list[torch.device]) -> dict[str, torch.device]:
    """A device map that puts equal runs of layers on the devices in order, the embedding first and the head last.

    Of a model with `tied` embeddings both are one tensor, and lie where the head does.
    """
    device_map = {f"model.layers.{i}": devices[i * len(devices) // layers] for i in range(layers)}
    return device_map | {
        "model.embed_tokens": devices[-1 if tied else 0],
        "model.rotary_emb": devices[0],
        "model.norm": devices[-1],
        "lm_head": devices[-1],
    }
