"""How a GGUF file stores the values of a tensor. Types that need data or search are llama.cpp's own tool's to make."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
"""GGUF's names of the dtypes that matrices can have."""

PIECE = 1 << 24
"""Weights that are quantised at a time."""


def stored_as(shape: torch.Size, dtype: str) -> str:
    """The dtype of a tensor where matrices are to have `dtype`: vectors are float32, as llama.cpp wants them, and rows
    that q8_0's blocks do not divide are float16, as it does itself."""
    if len(shape) == 1:
        return "float32"
    return "float16" if shape[-1] % _block(dtype)[0] else dtype


def bytes_of(shape: torch.Size, dtype: str) -> int:
    weights, size = _block(dtype)
    return shape.numel() // weights * size


def type_of(dtype: str) -> Any:
    """The gguf library's constant."""
    import gguf

    return gguf.GGMLQuantizationType[TYPES[dtype]]


def encoded(tensor: Tensor, dtype: str) -> Iterator[Any]:
    """The bytes of a tensor, which has its dtype already unless that is q8_0, in pieces: memoryviews."""
    import gguf

    if dtype != "q8_0":
        yield tensor.reshape(-1).view(torch.uint8).numpy().data
        return
    for rows in tensor.split(max(PIECE // tensor.shape[-1], 1)):
        yield gguf.quants.quantize(rows.float().numpy(), type_of(dtype)).data


def _block(dtype: str) -> tuple[int, int]:
    """How many weights are stored together, and in how many bytes."""
    import gguf

    weights, size = gguf.GGML_QUANT_SIZES[type_of(dtype)]
    return weights, size
