"""How the C library hands out memory on a CPU, where every large tensor is asked for and given back again and again."""

from __future__ import annotations

import ctypes
import os
import sys

LARGEST_KEPT = (128 * 2**20, 32 * 2**20)
"""Bytes of the largest block that is kept for the next tensor, and what older versions of glibc accept at most."""

MOST_KEPT = 512 * 2**20
"""Free bytes at the end of the heap beyond which they are given back to the system."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""The options of mallopt(3)."""


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks instead of giving them back to the system.

    New pages are cleared one by one when they are first written, which took a tenth of a forward pass of SmolLM2-135M
    on a CPU (scripts/bench/freed_memory.py). Nothing happens with other C libraries, or where the environment sets
    these limits.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and any(mallopt(_M_MMAP_THRESHOLD, size) for size in LARGEST_KEPT):
        mallopt(_M_TRIM_THRESHOLD, MOST_KEPT)
