"""fp8 products in float32, and whether this PyTorch has its own on the CPU."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from pgprune_cli.errors import UserError
from pgprune_cli.model.quantized import FP8, check_fp8

FP8_MISSING = ("fp8", "scaled_mm", "ScalingType")
"""What an error says if PyTorch lacks the products of fp8 matrices."""


def slowly_rounded(row: Tensor) -> Tensor:
    """Return a row rounded to e4m3 and back."""
    smallest = torch.finfo(torch.float32).smallest_normal
    scale = (row.float().abs().max() / 448.0).clamp_min(smallest)
    return (row.float() / scale).to(FP8).float().mul(scale).to(row.dtype)


def rounded_product(inputs: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """Return `inputs` `(…, in)`, rounded per token, times rounded weights, as `fp8_product` does, in float32."""
    rounded = torch.stack([slowly_rounded(row.float()) for row in inputs.flatten(0, -2)])
    return (rounded @ (values.view(FP8).float() * scale).t()).unflatten(0, inputs.shape[:-1])


@cache
def multiplies_fp8_on_cpu() -> bool:
    """Return whether this PyTorch multiplies fp8 matrices on the CPU, as it does from 2.13 on."""
    try:
        check_fp8(torch.device("cpu"), torch.float32)
    except UserError:
        return False
    return True


def lacks_fp8(error: object) -> bool:
    """Return whether an error or its text comes from a PyTorch that cannot multiply fp8 matrices on the CPU."""
    return not multiplies_fp8_on_cpu() and any(name in str(error) for name in FP8_MISSING)
