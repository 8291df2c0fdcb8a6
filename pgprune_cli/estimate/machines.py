"""The rates at which machines compute and move data: of GPUs that may not be here, from their data sheets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pgprune_cli.console.suggest import nearest
from pgprune_cli.errors import UserError

PRODUCTS = 0.6
"""Fraction of a data sheet's FLOPs per second that the matrix products of a search reach: they have 1,024 rows."""

BANDWIDTH = 0.8
"""Fraction of a data sheet's bytes per second that copies reach, in a GPU's memory and over PCIe."""

LEFT = 0.96
"""Fraction of a GPU's memory that CUDA itself leaves to PyTorch."""

OPERATION = 15e-6
"""Seconds in which Python, transformers, PyTorch and the driver launch one operation: an assumption."""

PAGEABLE = 6e9
"""Bytes per second that are copied between a GPU and memory of the host that is not pinned."""

STAGED = 1e10
"""Bytes per second that one thread copies from a mapped file, cached in memory, to a pinned buffer: an assumption."""

DISK = 2e9
"""Bytes per second of an NVMe disk, read or written by one process."""

CHECKSUM = 1.5e9
"""Bytes per second of SHA-256, by one thread with instructions for it."""

TOKENIZED = 4e5
"""Tokens per second that a tokenizer makes of text."""

HOST_PRODUCTS = 1e12
"""FLOPs per second in float32 of the processors of a server, which solve what a GPU has no memory for."""


class Gpu(NamedTuple):
    """A row of the table, from data sheets.

    gibibytes: of memory, as the driver shows it; bfloat16 (dense, with float32 sums), float32, float64: TFLOP/s of
    matrix products, with tensor cores where there are any for the dtype; memory, pcie: GB/s, PCIe in one direction.
    """

    gibibytes: int
    bfloat16: float
    float32: float
    float64: float
    memory: float
    pcie: float


GPUS: Mapping[str, Gpu] = {
    # NVIDIA Ampere GA102, Ada and RTX Blackwell architecture whitepapers
    "rtx-3090": Gpu(24, 71.0, 35.6, 0.56, 936, 31.5),
    "rtx-4090": Gpu(24, 165.2, 82.6, 1.29, 1008, 31.5),
    "rtx-5090": Gpu(32, 209.5, 104.8, 1.64, 1792, 63.0),
    # NVIDIA data sheets: of the L40S, a PCIe card, and of the SXM modules of A100, H100 and H200
    "l40s-48gb": Gpu(45, 362.0, 91.6, 1.43, 864, 31.5),
    "a100-80gb": Gpu(80, 312.0, 19.5, 19.5, 2039, 31.5),
    "h100-80gb": Gpu(80, 989.0, 67.0, 67.0, 3350, 63.0),
    "h200-141gb": Gpu(140, 989.0, 67.0, 67.0, 4800, 63.0),
}
"""GPUs by name."""


@dataclass(frozen=True)
class Machine:
    """What a time is computed from.

    flops_per_second: in matrix products, by dtype; memory_bandwidth: bytes per second that the device reads and writes
    in its own memory; pcie: bytes per second between the host and the device, None if they are the same; memory: bytes
    of one device, 0 if what is free now counts.
    """

    flops_per_second: Mapping[torch.dtype, float]
    memory_bandwidth: float
    pcie: float | None = None
    memory: int = 0


def gpu(name: str) -> Machine:
    """Return the machine with GPUs of that name. Raises UserError for a name that is not in the table."""
    if name not in GPUS:
        hint = nearest(name.lower(), GPUS) or "."
        raise UserError(f"--on: {name!r} is not a GPU that pgprune knows{hint} Choose from {', '.join(GPUS)}.")
    sheet = GPUS[name]
    rates = {
        torch.bfloat16: sheet.bfloat16,
        torch.float16: sheet.bfloat16,
        torch.float32: sheet.float32,
        torch.float64: sheet.float64,
    }
    return Machine(
        {dtype: PRODUCTS * rate * 1e12 for dtype, rate in rates.items()},
        BANDWIDTH * sheet.memory * 1e9,
        BANDWIDTH * sheet.pcie * 1e9,
        round(LEFT * sheet.gibibytes * 2**30),
    )
