"""Running out of memory: how PyTorch and CUDA's libraries report it, and what is then solved on the CPU instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from pgprune_cli.console.stderr import warn
from pgprune_cli.errors import RunError

Solution = TypeVar("Solution")

FAILED_ALLOCATIONS = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
)
"""What errors other than torch.OutOfMemoryError say when memory has run out."""

UNCLEAR_FAILURES = ("STATUS_INTERNAL_ERROR", "STATUS_NOT_INITIALIZED")
"""What cuBLAS and cuSOLVER also say then, and for other reasons, too."""

WORKSPACE = 512 * 2**20
"""Free bytes on a GPU below which an unclear failure is taken for one of memory: the libraries need about this much."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that a GPU or the host has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    if any(failed in text for failed in FAILED_ALLOCATIONS):
        return True
    return any(unclear in text for unclear in UNCLEAR_FAILURES) and _least_free() < WORKSPACE


def or_on_cpu(solve: Callable[..., Solution], *tensors: Tensor) -> Solution:
    """Return `solve(*tensors)`, solved on the CPU, which is said on stderr, if their devices have no memory for it.

    `solve` leaves its arguments unchanged. Raises RunError if the host's memory does not suffice either.
    """
    try:
        return solve(*tensors)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        largest = max(tensors, key=Tensor.numel)
        if all(tensor.device.type == "cpu" for tensor in tensors):
            size = f"{largest.nbytes / 1e9:,.2f} GB, and some more matrices of that size are needed"
            raise RunError(
                f"out of memory while solving equations of {tuple(largest.shape)}: one matrix takes {size}. "
                "Stop other programs, or use a machine with more memory."
            ) from error
    # Only after the except clause: until then the traceback keeps the tensors of the failed attempt alive.
    torch.cuda.empty_cache()
    shape = tuple(largest.shape)
    warn(
        f"{largest.device}: out of memory while solving equations of {shape}. The CPU solves them, which takes longer."
    )
    return or_on_cpu(solve, *(tensor.cpu() for tensor in tensors))


def _least_free() -> int:
    """Return the free bytes of the fullest GPU that this process uses."""
    if not torch.cuda.is_initialized():
        return WORKSPACE
    used = [index for index in range(torch.cuda.device_count()) if torch.cuda.memory_allocated(index)]
    return min((torch.cuda.mem_get_info(index)[0] for index in used), default=WORKSPACE)
