"""A lane of buffers on any device, which refuses to overwrite a weight that is in use and records what it does."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from pgprune_cli.forward.uploads import SLOTS


class PlainLane:
    """Copies in the calling thread, without streams.

    events: ("copied" | "arrived" | "used", slot) in order.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self.events: list[tuple[str, int]] = []
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._in_use: set[int] = set()
        self._lock = threading.Lock()

    def _record(self, event: str, slot: int) -> None:
        with self._lock:
            self.events.append((event, slot))

    def copy(self, slot: int, weight: Tensor) -> None:
        assert weight.device.type == "cpu"
        assert slot not in self._in_use, f"slot {slot} is overwritten while a block uses it"
        part = self._buffers[slot][: weight.nbytes].view(weight.dtype)
        part.copy_(weight.as_strided((weight.numel(),), (1,)))
        self._record("copied", slot)

    def arrived(self, slot: int, weight: Tensor) -> Tensor:
        self._in_use.add(slot)
        self._record("arrived", slot)
        part = self._buffers[slot][: weight.nbytes].view(weight.dtype)
        return part.as_strided(weight.shape, weight.stride())

    def used(self, slot: int) -> None:
        self._in_use.discard(slot)
        self._buffers[slot].fill_(0x7F)  # whatever still reads it computes nonsense
        self._record("used", slot)
