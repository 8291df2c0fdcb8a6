"""How a GGUF file stores the values of a tensor.

Types that need calibration data or a search are left to llama.cpp's own quantisation tool.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
"""The dtypes in which pgprune can write matrices, and GGUF's names for them. Other types have the same name in both."""

WEIGHTS_AT_A_TIME = 1 << 24
"""How many weights are quantised at a time."""


def stored_dtype(shape: torch.Size, dtype: str) -> str:
    """Return the dtype in which a tensor is stored if matrices are stored as `dtype`.

    As in llama.cpp, vectors are float32, and matrices whose rows the blocks of q8_0 do not divide are float16.
    """
    if len(shape) == 1:
        return "float32"
    return "float16" if shape[-1] % _block(dtype)[0] else dtype


def bytes_of(shape: torch.Size, dtype: str) -> int:
    """Return the size of a tensor in its file."""
    weights, size = _block(dtype)
    return shape.numel() // weights * size


def type_of(dtype: str) -> Any:
    """Return the gguf library's constant for a dtype."""
    import gguf

    return gguf.GGMLQuantizationType[TYPES.get(dtype, dtype.upper())]


def encoded(tensor: Tensor, dtype: str) -> Iterator[Any]:
    """Yield the bytes of a tensor piece by piece, as memoryviews. It must have `dtype` already, unless that is q8_0."""
    import gguf

    if dtype != "q8_0":
        yield tensor.reshape(-1).view(torch.uint8).numpy().data
        return
    for rows in tensor.split(max(WEIGHTS_AT_A_TIME // tensor.shape[-1], 1)):
        yield gguf.quants.quantize(rows.float().numpy(), type_of(dtype)).data


def _block(dtype: str) -> tuple[int, int]:
    """Return how many weights are stored together, and in how many bytes."""
    import gguf

    weights, size = gguf.GGML_QUANT_SIZES[type_of(dtype)]
    return weights, size
