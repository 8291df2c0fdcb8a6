"""Models pruned by pgprune, for MLX: Llama, Mistral, Qwen2 and Qwen3 whose layers differ in their sizes.

This file is part of every directory that `pgprune export --format mlx` writes, and mlx-lm runs it if
`trust_remote_code=True` (`--trust-remote-code`) is given. It does not need pgprune. modeling_pruned.py does the same
for transformers, and explains the keys of config.json.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama, qwen3
from mlx_lm.models.base import BaseModelArgs, create_attention_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache


@dataclasses.dataclass
class ModelArgs(BaseModelArgs):
    """The content of config.json, with the defaults of transformers. skip: the blocks that a layer lacks."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    num_key_value_heads: int | None = None
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    rope_theta: float | None = None
    rope_scaling: dict | None = None
    rope_traditional: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    output_biases: list[str] = dataclasses.field(default_factory=list)
    per_layer_config: dict[str, dict] = dataclasses.field(default_factory=dict)
    skip: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        if self.rope_parameters:  # written by transformers 5, the other two by older versions
            self.rope_theta, self.rope_scaling = self.rope_parameters.get("rope_theta"), self.rope_parameters
        self.rope_theta = self.rope_theta or 10000.0

    @property
    def family(self) -> str:
        """The model type of the dense model."""
        return self.model_type.removeprefix("pruned_")

    def of_layers(self) -> Iterator["ModelArgs"]:
        """Yield the arguments of each layer in order. `sliding_window` is None if the layer sees all tokens."""
        for index in range(self.num_hidden_layers):
            kind = self.layer_types[index] if self.layer_types else None
            # A Mistral has its window in every layer, the others in the layers that layer_types names.
            sliding = kind == "sliding_attention" or (kind is None and self.family == "mistral")
            window = self.sliding_window if sliding else None
            overrides = self.per_layer_config.get(str(index), {})
            yield dataclasses.replace(self, sliding_window=window, **overrides)


def linear(old: nn.Linear, bias: bool) -> nn.Linear:
    """Return a layer of the same shape, with or without a bias."""
    outputs, inputs = old.weight.shape
    return nn.Linear(inputs, outputs, bias=bias)


def attention(args: ModelArgs) -> nn.Module:
    block = (qwen3 if args.family == "qwen3" else llama).Attention(args)
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(block, name, linear(block[name], args.attention_bias or args.family == "qwen2"))
    block.o_proj = linear(block.o_proj, args.attention_bias or "attention" in args.output_biases)
    return block


def feed_forward(args: ModelArgs) -> nn.Module:
    block = llama.MLP(args)
    block.down_proj = linear(block.down_proj, args.mlp_bias or "mlp" in args.output_biases)
    return block


class Layer(nn.Module):
    """A decoder layer. A skipped block does not exist, and neither does its norm."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.window = args.sliding_window
        self.has_heads, self.has_channels = "attention" not in args.skip, "mlp" not in args.skip
        if self.has_heads:
            self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
            self.self_attn = attention(args)
        if self.has_channels:
            self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
            self.mlp = feed_forward(args)

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        if self.has_heads:
            x = x + self.self_attn(self.input_layernorm(x), mask, cache)
        if self.has_channels:
            x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Decoder(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Layer(layer) for layer in args.of_layers()]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, inputs: mx.array, cache: list | None, input_embeddings: mx.array | None) -> mx.array:
        x = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        with_heads = [index for index, layer in enumerate(self.layers) if layer.has_heads]
        slots = dict(zip(with_heads, cache or [None] * len(with_heads), strict=True))
        masks: dict[int | None, Any] = {}
        for index, slot in slots.items():  # before any layer writes to its slot
            window = self.layers[index].window
            if window not in masks:
                masks[window] = create_attention_mask(x, slot, window_size=window)
        for index, layer in enumerate(self.layers):
            x = layer(x, masks.get(layer.window), slots.get(index))
        return self.norm(x)


class Model(nn.Module):
    """The model that mlx-lm builds and calls."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Decoder(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(
        self, inputs: mx.array, cache: list | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        x = self.model(inputs, cache, input_embeddings)
        return self.model.embed_tokens.as_linear(x) if self.args.tie_word_embeddings else self.lm_head(x)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        if self.args.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        return weights

    @property
    def layers(self) -> list[Layer]:
        return self.model.layers

    def make_cache(self) -> list:
        """Return a slot for every layer with heads. mlx-lm cannot save slots that stay empty."""
        windows = [layer.window for layer in self.layers if layer.has_heads]
        return [RotatingKVCache(max_size=window) if window else KVCache() for window in windows]
