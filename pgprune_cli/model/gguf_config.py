"""What the config of a GGUF model needs beyond what transformers reads: the scaling of RoPE and of attention scores.

Of RoPE, transformers reads only the base of the frequencies, and takes its own defaults for the rest without a word.
What can be said exactly in a transformers config is added here, and everything else is refused.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgprune_cli.errors import UserError
from pgprune_cli.model.gguf_header import F32, Header

FACTORS = "rope_freqs.weight"
"""The tensor that frequencies are divided by. Llama 3.1, 3.2 and 3.3 have their scaling in it alone."""
FACTORS_BY_LENGTH = ("rope_factors_long.weight", "rope_factors_short.weight")
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What the scaled models of Llama 3 have in common. Their factor, 8 or 32, is the last entry of the tensor."""
LARGEST = {"gemma2": 46, "gemma3": 62}
"""Layers of the largest models, whose attention llama.cpp scales by hidden size / heads instead of by head size."""
USE_SAFETENSORS = "Give the model as safetensors."


def complete(config: Any, name: str, path: Path, header: Header) -> None:
    """Add what transformers does not read of a GGUF file to the config that it made. Raises UserError as `scaling`."""
    if scaling := rope_scaling(name, path, header):
        parameters = dict(config.rope_parameters)
        if full := parameters.get("full_attention"):  # layers with a sliding window are not scaled
            parameters["full_attention"] = full | scaling
        else:
            parameters |= scaling
        config.rope_parameters = parameters
    if hasattr(config, "query_pre_attn_scalar"):  # of Gemma 2 and 3
        is_largest = config.num_hidden_layers == LARGEST.get(header.architecture)
        config.query_pre_attn_scalar = (
            config.hidden_size // config.num_attention_heads if is_largest else config.head_dim
        )


def rope_scaling(name: str, path: Path, header: Header) -> dict[str, Any]:
    """Return what a transformers config says about the scaling of RoPE in a GGUF file, an empty dict without scaling.

    name: of the model, for messages. Raises UserError for a RoPE that is not translated.
    """
    head_size = _head_size(header)
    rotated = header.numbers.get(f"{header.architecture}.rope.dimension_count", head_size)
    if rotated != head_size:
        raise UserError(
            f"{name}: rotates {rotated} of the {head_size} dimensions of a head, which transformers does not read from "
            f"GGUF. {USE_SAFETENSORS}"
        )
    key = f"{header.architecture}.rope.scaling.type"
    kind = header.texts.get(key, "linear")
    by_length = next((tensor for tensor in FACTORS_BY_LENGTH if tensor in header.tensors), None)
    if kind not in ("none", "linear") or by_length is not None:
        raise UserError(
            f"{name}: its RoPE is scaled ({by_length or f'{key} = {kind}'}), which transformers does not read from "
            f"GGUF. {USE_SAFETENSORS}"
        )
    factor = _linear_factor(header) if kind == "linear" else 1.0
    if FACTORS not in header.tensors and 0.0 < factor < math.inf:
        return {} if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    scaling = _llama3_scaling(path, header, head_size) if factor == 1.0 else None
    if scaling is None:
        raise UserError(
            f"{name}: its RoPE is not scaled as that of Llama 3 is ({FACTORS}, factor {factor:g}), and no other such "
            f"scaling is read from GGUF. {USE_SAFETENSORS}"
        )
    return scaling


def frequency_factors(theta: float, dimensions: int, frequencies: Tensor) -> Tensor:
    """Return what llama.cpp's frequencies must be divided by to become these.

    theta: base of llama.cpp's frequencies; dimensions: rows of a head that are rotated; frequencies: `(n,)`, for the
    first n of dimensions / 2. Returns float32 `(n,)`.
    """
    exponents = torch.arange(0, dimensions, 2, dtype=torch.float64) / dimensions
    return (theta ** -exponents[: len(frequencies)] / frequencies.double()).float()


def _head_size(header: Header) -> int:
    """Return how many dimensions a head has, 0 if the file does not say."""
    numbers, prefix = header.numbers, header.architecture
    heads = numbers.get(f"{prefix}.attention.head_count", 0)
    derived = numbers.get(f"{prefix}.embedding_length", 0) // heads if heads else 0
    return numbers.get(f"{prefix}.attention.key_length", derived)


def _linear_factor(header: Header) -> float:
    """Return the factor of linear scaling, 1 without. llama.cpp reads its older name as well."""
    keys = (f"{header.architecture}.rope.{key}" for key in ("scaling.factor", "scale_linear"))
    return next((header.floats[key] for key in keys if key in header.floats), 0.0) or 1.0


def _llama3_scaling(path: Path, header: Header, head_size: int) -> dict[str, Any] | None:
    """Return the scaling of Llama 3 that has the factors of a GGUF file, None if none has."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stored = header.tensors.get(FACTORS)
    if stored is None or stored.type != F32 or stored.shape != (head_size / 2,):
        return None
    with path.open("rb") as file:
        file.seek(stored.start)
        factors = torch.tensor(struct.unpack(f"<{head_size // 2}f", file.read(stored.end - stored.start)))
    factor = round(float(factors[-1]), 3) if factors.isfinite().all() else 0.0
    if factor < 1.0:
        return None
    theta = header.floats.get(f"{header.architecture}.rope.freq_base", 10000.0)
    scaling = {"rope_type": "llama3", "factor": factor, **LLAMA3}
    config = LlamaConfig(head_dim=head_size, rope_parameters={"rope_theta": theta, **scaling})
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return scaling if torch.allclose(frequency_factors(theta, head_size, frequencies), factors, rtol=1e-4) else None
