"""Phi-3 and Phi-4: a Llama with one projection for queries, keys and values, and one for gate and up."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from pgprune_cli.model.families.adapter import Block, GgufArchitectures
from pgprune_cli.model.families.llama import ATTENTION, FFN, LlamaFamily
from pgprune_cli.model.unit_tensors import Part


class Phi3Family(LlamaFamily):
    """The adapter of Phi-3 and Phi-4. Units are rows of the fused projections, which stay fused."""

    def parts(self, block: Block, projection: str, per_element: Part, per_group: Part) -> tuple[Part, ...]:
        if block == self.ffn:
            return per_element, per_element
        return per_element, per_group, per_group

    def key_value_heads(self, layer: nn.Module) -> int:
        fused, output = self.attention.linears(layer)
        return (fused.out_features - output.in_features) // (2 * self._head_width(layer))

    def settings(self, layer: nn.Module, block: Block, groups: int, members: int) -> list[tuple[nn.Module, str, Any]]:
        if block == self.ffn:
            return []
        module: Any = layer.get_submodule(block.module)
        config = copy.copy(module.config)  # the attention takes the number of query heads from it
        config.num_attention_heads = groups * members
        kv_heads = (module, "num_key_value_heads", groups)
        return [*super().settings(layer, block, groups, members), kv_heads, (module, "config", config)]

    def activation_width(self, block: Block, hidden: int, inner: tuple[int, ...], inputs: int) -> int:
        if block == self.ffn:
            return 4 * hidden + 4 * inputs
        keys = (inner[0] - inputs) // 2
        return super().activation_width(block, hidden, (inputs, keys, keys), inputs)

    def stock_config(self, config: Any, kept: Mapping[str, tuple[int, int]]) -> dict[str, Any] | None:
        sizes = self.layer_config(config, kept)
        # With other numbers of heads, the config expects other numbers of rotary factors.
        is_same = sizes["num_attention_heads"] == config.num_attention_heads
        return sizes if is_same or config.rope_parameters["rope_type"] == "default" else None


PHI3 = Phi3Family(
    model_types=("phi3",),
    attention=replace(ATTENTION, projections=("qkv_proj", "o_proj")),
    ffn=replace(FFN, projections=("gate_up_proj", "down_proj")),
    gguf={"phi3": GgufArchitectures("phi3", "deci")},
)
