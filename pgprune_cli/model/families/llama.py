"""Llama, Mistral, Ministral 3, Qwen2, Qwen3 and Seed-OSS.

They have q, k, v, o and gate, up, down projections, and a norm before each block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pgprune_cli.core.grid import Grid
from pgprune_cli.model.families.adapter import Block, GgufArchitectures, ModelFamily, dense_type
from pgprune_cli.model.unit_tensors import Part, UnitTensor


class NoAttention(nn.Module):
    """Runs in place of a removed attention block: adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


class NoFeedForward(nn.Module):
    """Runs in place of a removed FFN block: adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


ATTENTION = Block(
    name="attention",
    module="self_attn",
    norms=("input_layernorm",),
    projections=("q_proj", "k_proj", "v_proj", "o_proj"),
    config_name="attention",
    element_name="query heads",
    group_name="KV heads",
)
FFN = Block(
    name="ffn",
    module="mlp",
    norms=("post_attention_layernorm",),
    projections=("gate_proj", "up_proj", "down_proj"),
    config_name="mlp",
    element_name="FFN channels",
)


@dataclass(frozen=True, kw_only=True)
class LlamaFamily(ModelFamily):
    """The adapter of every model type that transformers lays out like a Llama."""

    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    rotary: str = "model.rotary_emb"
    head: str = "lm_head"
    attention: Block = ATTENTION
    ffn: Block = FFN
    residual: str = "post_attention_layernorm"

    def grid(self, layer: nn.Module, block: Block) -> Grid:
        if block == self.ffn:
            return Grid(1, block.output_linear(layer).in_features, shared_rows=False)
        kv_heads, width = self.key_value_heads(layer), self._head_width(layer)
        return Grid(kv_heads, block.output_linear(layer).in_features // width // kv_heads)

    def unit_tensors(self, layer: nn.Module, block: Block) -> tuple[UnitTensor, ...]:
        grid = self.grid(layer, block)
        per_element = Part(grid.elements, 1 if block == self.ffn else self._head_width(layer))
        per_group = Part(grid.groups, per_element.width)
        *inner, output = zip(block.projections, block.linears(layer), strict=True)
        tensors = []
        for name, linear in inner:
            parts = self.parts(block, name, per_element, per_group)
            tensors.append(UnitTensor(f"{name}.weight", 0, parts))
            if linear.bias is not None:
                tensors.append(UnitTensor(f"{name}.bias", 0, parts))
        return *tensors, UnitTensor(f"{output[0]}.weight", 1, (per_element,))

    def parts(self, block: Block, projection: str, per_element: Part, per_group: Part) -> tuple[Part, ...]:
        """Return what the rows of an inner projection are: runs per element, except those of keys and values."""
        is_shared = block == self.attention and projection != block.projections[0]
        return (per_group,) if is_shared else (per_element,)

    def settings(self, layer: nn.Module, block: Block, groups: int, members: int) -> list[tuple[nn.Module, str, Any]]:
        if block == self.ffn:
            return []
        return [(layer.get_submodule(block.module), "num_key_value_groups", members)]

    def key_value_heads(self, layer: nn.Module) -> int:
        """Return how many KV heads the attention of a dense layer has."""
        _, keys, *_ = self.attention.linears(layer)
        return keys.out_features // self._head_width(layer)

    def _head_width(self, layer: nn.Module) -> int:
        attention: Any = layer.get_submodule(self.attention.module)
        width: int = attention.head_dim
        return width

    def placeholder(self, block: Block) -> nn.Module:
        return NoAttention() if block == self.attention else NoFeedForward()

    def attention_flops(self, layer: nn.Module, visible_keys: int, context: int) -> dict[str, int]:
        # 2 FLOPs per product: the scores, and the sum over the values.
        scores = round(4 * self._head_width(layer) * visible_keys / context)
        return {self.attention.name: scores, self.ffn.name: 0}

    def cache_bytes(self, layer: nn.Module, tokens: int) -> dict[str, int]:
        size = self.attention.output_linear(layer).weight.element_size()
        return {self.attention.name: 2 * self._head_width(layer) * size * tokens, self.ffn.name: 0}

    def attention_window(self, config: Any, layer: nn.Module, context: int) -> int:
        attention = layer.get_submodule(self.attention.module)
        window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
        return min(context, window or context)

    def activation_width(self, block: Block, hidden: int, inner: tuple[int, ...], inputs: int) -> int:
        if block == self.ffn:
            return 4 * hidden + 3 * inputs
        queries, keys = inner[0], inner[1]  # while queries or keys are rotated
        return 3 * hidden + max(4 * queries + 2 * keys, 2 * queries + 5 * keys)

    def head_dim(self, config: Any) -> int:
        head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return head_dim

    def layer_config(self, config: Any, kept: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        kv_heads, queries_per_kv_head = kept[self.attention.name]
        _, channels = kept[self.ffn.name]
        sizes: dict[str, int] = {}
        if kv_heads:
            sizes |= {"num_attention_heads": kv_heads * queries_per_kv_head, "num_key_value_heads": kv_heads}
        if channels:
            sizes["intermediate_size"] = channels
        return sizes

    def stock_config(self, config: Any, kept: Mapping[str, tuple[int, int]]) -> dict[str, Any] | None:
        sizes: dict[str, Any] = self.layer_config(config, kept)
        if dense_type(config.model_type) != "llama" or config.hidden_size % sizes["num_attention_heads"] == 0:
            return sizes
        if config.attention_bias or config.mlp_bias:
            return None
        # Llama's config refuses a number of heads that does not divide the hidden size. A Mistral without a sliding
        # window is the same model, and its config accepts any number.
        mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
        return sizes | mistral | {"max_position_embeddings": config.max_position_embeddings}


LLAMA = LlamaFamily(
    model_types=("llama", "mistral", "qwen2", "qwen3", "ministral3", "seed_oss"),
    # `deci` is llama.cpp's Llama whose layers have their own sizes, and `openelm` its Qwen3 with tied embeddings.
    gguf={
        "llama": GgufArchitectures("llama", "deci"),
        "mistral": GgufArchitectures("llama", "deci"),
        "qwen2": GgufArchitectures("qwen2", "deci"),
        "qwen3": GgufArchitectures("qwen3", "openelm"),
        "ministral3": GgufArchitectures("mistral3", "deci"),
        "seed_oss": GgufArchitectures(None, "deci"),
    },
)
