"""Llama, Mistral, Qwen2 and Qwen3: separate q, k, v, o and gate, up, down projections, a norm before each block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pgprune_cli.model.families.adapter import Block, GgufArchitectures, ModelFamily, Projection


class NoAttention(nn.Module):
    """Runs in place of a removed attention block: adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


class NoFeedForward(nn.Module):
    """Runs in place of a removed FFN block: adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


class LlamaFamily(ModelFamily):
    """The adapter of every model type that transformers lays out like a Llama."""

    def units(self, layer: nn.Module) -> dict[str, int]:
        attention: Any = layer.get_submodule(self.attention.module)
        _, keys, *_ = self.attention.linears(layer)
        return {
            self.attention.name: keys.out_features // attention.head_dim,
            self.ffn.name: self.ffn.output_linear(layer).in_features,
        }

    def placeholder(self, block: Block) -> nn.Module:
        return NoAttention() if block == self.attention else NoFeedForward()

    def attention_flops(self, layer: nn.Module, visible_keys: int, context: int) -> dict[str, int]:
        attention: Any = layer.get_submodule(self.attention.module)
        queries, *_ = self.attention.linears(layer)
        queries_per_kv_head = queries.out_features // attention.head_dim // self.units(layer)[self.attention.name]
        # 2 FLOPs per product: the scores, and the sum over the values.
        scores = round(4 * attention.head_dim * queries_per_kv_head * visible_keys / context)
        return {self.attention.name: scores, self.ffn.name: 0}

    def cache_bytes(self, layer: nn.Module, tokens: int) -> dict[str, int]:
        attention: Any = layer.get_submodule(self.attention.module)
        _, keys, *_ = self.attention.linears(layer)
        return {self.attention.name: 2 * attention.head_dim * keys.weight.element_size() * tokens, self.ffn.name: 0}

    def attention_window(self, config: Any, layer: nn.Module, context: int) -> int:
        attention = layer.get_submodule(self.attention.module)
        window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
        return min(context, window or context)

    def activation_width(self, block: Block, hidden: int, inner: tuple[int, ...], inputs: int) -> int:
        if block == self.ffn:
            return 4 * hidden + 3 * inputs
        queries, keys = inner[0], inner[1]  # while queries or keys are rotated
        return 3 * hidden + max(4 * queries + 2 * keys, 2 * queries + 5 * keys)

    def rotated_heads(self, tensor: str, units: Mapping[str, int], queries_per_kv_head: int) -> int | None:
        queries, keys, *_ = self.attention.projections
        kv_heads = units[self.attention.name]
        heads = {
            f"{self.attention.module}.{queries.name}": kv_heads * queries_per_kv_head,
            f"{self.attention.module}.{keys.name}": kv_heads,
        }
        module, _, kind = tensor.rpartition(".")
        return heads.get(module) if kind in ("weight", "bias") else None

    def head_dim(self, config: Any) -> int:
        head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return head_dim

    def layer_config(self, config: Any, units: Mapping[str, int]) -> dict[str, int]:
        kv_heads, channels = units[self.attention.name], units[self.ffn.name]
        sizes: dict[str, int] = {}
        if kv_heads:
            queries_per_kv_head = config.num_attention_heads // config.num_key_value_heads
            sizes |= {"num_attention_heads": kv_heads * queries_per_kv_head, "num_key_value_heads": kv_heads}
        if channels:
            sizes["intermediate_size"] = channels
        return sizes

    def stock_config(self, config: Any, units: Mapping[str, int]) -> dict[str, Any] | None:
        sizes: dict[str, Any] = self.layer_config(config, units)
        if config.model_type != "llama" or config.hidden_size % sizes["num_attention_heads"] == 0:
            return sizes
        if config.attention_bias or config.mlp_bias:
            return None
        # Llama's config refuses a number of heads that does not divide the hidden size. A Mistral without a sliding
        # window is the same model, and its config accepts any number.
        mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
        return sizes | mistral | {"max_position_embeddings": config.max_position_embeddings}


LLAMA = LlamaFamily(
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    layers="model.layers",
    embedding="model.embed_tokens",
    final_norm="model.norm",
    rotary="model.rotary_emb",
    head="lm_head",
    attention=Block(
        name="attention",
        module="self_attn",
        norm="input_layernorm",
        projections=(
            Projection("q_proj", 0),
            Projection("k_proj", 0),
            Projection("v_proj", 0),
            Projection("o_proj", 1),
        ),
        config_name="attention",
        unit_name="KV heads",
    ),
    ffn=Block(
        name="ffn",
        module="mlp",
        norm="post_attention_layernorm",
        projections=(Projection("gate_proj", 0), Projection("up_proj", 0), Projection("down_proj", 1)),
        config_name="mlp",
        unit_name="FFN channels",
    ),
    # `deci` is llama.cpp's Llama whose layers have their own sizes. It has no norms of queries and keys, so no Qwen3.
    gguf={
        "llama": GgufArchitectures("llama", "deci"),
        "mistral": GgufArchitectures("llama", "deci"),
        "qwen2": GgufArchitectures("qwen2", "deci"),
        "qwen3": GgufArchitectures("qwen3", None),
    },
)
