"""The FLOPs per second of a device in matrix products."""

from __future__ import annotations

import torch

from pgprune_cli.search.costs import synchronised_clock

SMALLEST, LARGEST = 512, 8192
"""Rows of the square matrices: doubled until a product takes long enough, or up to the largest size."""

LONG_ENOUGH = 50_000_000
"""Nanoseconds of one product after which its start-up no longer matters."""

REPEATS = 3


def matmul_rate(device: torch.device, dtype: torch.dtype, largest: int = LARGEST) -> float:
    """Return FLOPs per second: the best of a few products of random square matrices of growing size."""
    best, size = 0.0, SMALLEST
    while True:
        generator = torch.Generator().manual_seed(0)
        left = torch.randn(size, size, generator=generator).to(device, dtype)
        times = []
        for _ in range(REPEATS + 1):
            began = synchronised_clock(device)
            left @ left
            times.append(max(1, synchronised_clock(device) - began))
        fastest = min(times[1:])  # the first warms up
        best = max(best, 2 * size**3 / fastest * 1e9)
        size *= 2
        if fastest >= LONG_ENOUGH or size > largest:
            return best
