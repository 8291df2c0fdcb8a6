"""Rotary embeddings in a GGUF file: its keys, its vectors of factors, and the order of a head's rows.

transformers rotates row i of a head with row i + rotated / 2. Some of llama.cpp's architectures do so too, and others
rotate neighbouring rows. Those also rotate all rows of a head: if a model rotates only the first ones, the frequencies
of the others are divided by so much that nothing is left of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pgprune_cli.export.gguf_architectures import Architecture
from pgprune_cli.model.gguf_config import FACTORS, frequency_factors

STATIC = ("linear", "llama3", "yarn")
"""Kinds of scaling whose frequencies do not depend on the length of the text, so one vector holds them."""
STILL = 1e30
"""What the frequency of rows that are not rotated is divided by."""


class InexpressibleError(Exception):
    """Why an architecture of llama.cpp cannot express a model, as the part of a sentence after its name."""


@dataclass(frozen=True)
class Rope:
    """The rotary embeddings of a model.

    theta: base of the frequencies, and `sliding_theta` that of the layers with a sliding window, if they have their
    own; rotated: how many rows of a head are rotated; dimensions: how many the file says; scale: of the rotated
    vectors; linear: factor of linear scaling; original_context: length of the texts before the scaling, 0 without;
    by_length: whether there are factors for short and for long contexts; tensors: what frequencies are divided by,
    float32 `(dimensions / 2,)`, by name in the file.
    """

    theta: float
    rotated: int
    dimensions: int
    sliding_theta: float | None = None
    scale: float = 1.0
    linear: float = 1.0
    original_context: int = 0
    by_length: bool = False
    tensors: Mapping[str, Tensor] = field(default_factory=dict, hash=False)

    @classmethod
    def of(cls, config: Any, head_dim: int, architecture: Architecture) -> Rope:
        """Return the rotary embeddings of a transformers config. Raises InexpressibleError."""
        by_type = config.rope_parameters
        parameters = by_type.get("full_attention", by_type)
        kind, theta = parameters["rope_type"], parameters["rope_theta"]
        rotated = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        sliding = by_type.get("sliding_attention")
        if sliding and sliding["rope_type"] != "default":
            raise InexpressibleError(f"cannot scale the RoPE of layers with a sliding window ({sliding['rope_type']})")
        dimensions = rotated if architecture.partial_rope else head_dim
        if rotated != dimensions and not architecture.rope_vector:
            raise InexpressibleError(f"cannot rotate {rotated} of the {head_dim} dimensions of a head")
        rope = cls(theta, rotated, dimensions, sliding["rope_theta"] if sliding else None)
        return rope._scaled(config, kind, parameters, architecture)

    def _scaled(self, config: Any, kind: str, parameters: Mapping[str, Any], architecture: Architecture) -> Rope:
        """Return these embeddings with the scaling of a config."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        if kind == "default":
            if self.rotated == self.dimensions:
                return self
            exponents = torch.arange(0, self.rotated, 2, dtype=torch.float64) / self.rotated
            return replace(self, tensors={FACTORS: self._factors(self.theta**-exponents)})
        if kind == "longrope" and architecture.rope_by_length:
            original = parameters["original_max_position_embeddings"]
            init = ROPE_INIT_FUNCTIONS["longrope"]
            (short, scale), (long, _) = (init(config, torch.device("cpu"), seq_len=n) for n in (original, original + 1))
            tensors = {
                "rope_factors_long.weight": self._factors(long),
                "rope_factors_short.weight": self._factors(short),
            }
            return replace(self, scale=scale, original_context=original, by_length=True, tensors=tensors)
        if kind == "linear" and architecture.windows:
            return replace(self, linear=parameters["factor"])
        if kind not in STATIC or not architecture.rope_vector:
            raise InexpressibleError(f"cannot store rope_parameters of type {kind}")
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        return replace(self, scale=scale, tensors={FACTORS: self._factors(frequencies)})

    def _factors(self, frequencies: Tensor) -> Tensor:
        """Return what llama.cpp's frequencies must be divided by to become `frequencies` `(rotated / 2,)`."""
        factors = torch.full((self.dimensions // 2,), STILL)
        factors[: len(frequencies)] = frequency_factors(self.theta, self.dimensions, frequencies)
        return factors

    def add(self, writer: Any) -> None:
        """Add the keys to the metadata of a GGUFWriter."""
        from gguf import RopeScalingType

        writer.add_rope_dimension_count(self.dimensions)
        writer.add_rope_freq_base(self.theta)
        if self.sliding_theta is not None:
            writer.add_rope_freq_base_swa(self.sliding_theta)
        if self.scale != 1.0:
            writer.add_rope_scaling_attn_factors(self.scale)
        if self.linear != 1.0:
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(self.linear)
        if self.original_context:
            writer.add_rope_scaling_orig_ctx_len(self.original_context)
        if self.by_length:
            writer.add_rope_scaling_type(RopeScalingType.LONGROPE)

    def in_pairs(self, make: Callable[[Tensor], Tensor], heads: int) -> Callable[[Tensor], Tensor]:
        """Return `make`, followed by reordering the rows of queries or keys (or of their bias) for rotated pairs."""
        return lambda tensor: self._paired(make(tensor), heads)

    def _paired(self, tensor: Tensor, heads: int) -> Tensor:
        by_head = tensor.unflatten(0, (heads, -1))
        still = by_head[:, self.rotated :]
        pairs = by_head[:, : self.rotated].unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        if still.shape[1]:  # llama.cpp scales them like the rotated ones
            pairs = torch.cat([pairs, (still.float() / self.scale).to(tensor.dtype)], 1)
        rows: Tensor = pairs.flatten(0, 1)
        return rows
