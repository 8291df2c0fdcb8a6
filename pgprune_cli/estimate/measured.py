"""The bytes per second that this machine's device moves."""

from __future__ import annotations

import torch

from pgprune_cli.search.costs import synchronised_clock

CACHED, BEYOND_CACHES = 1 << 24, 1 << 28
"""Bytes that are copied: about those of a forward pass's tensors on a CPU, and more than the caches of a GPU hold."""

REPEATS = 30


def memory_rate(device: torch.device) -> float:
    """Return the bytes per second that a device reads and writes in its own memory: the best of a few copies."""
    count = CACHED if device.type == "cpu" else BEYOND_CACHES
    source = torch.zeros(count // 8, dtype=torch.float64, device=device)
    return 2 * _rate(source, torch.empty_like(source), device)


def pcie_rate(device: torch.device) -> float:
    """Return the bytes per second that are copied from pinned memory of the host to a GPU."""
    source = torch.zeros(BEYOND_CACHES // 8, dtype=torch.float64, pin_memory=True)
    return _rate(source, torch.empty_like(source, device=device), device)


def _rate(source: torch.Tensor, target: torch.Tensor, device: torch.device) -> float:
    times = []
    for _ in range(REPEATS + 1):
        began = synchronised_clock(device)
        target.copy_(source, non_blocking=True)
        times.append(max(1, synchronised_clock(device) - began))
    return source.nbytes / min(times[1:]) * 1e9  # the first warms up
