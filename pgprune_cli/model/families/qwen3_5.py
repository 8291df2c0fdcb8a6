"""Qwen3.5 (dense): three of four layers are gated DeltaNets, the others have full attention with an output gate.

A *gated DeltaNet* keeps a matrix per value head, which every token rewrites, in place of a KV cache. Each of its key
heads has a query, a key and several consecutive value heads, and is removed with all of them: their rows in the fused
projection, the convolution, the gates and decays, and their columns in the output projection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pgprune_cli.core.grid import Grid
from pgprune_cli.model.families.adapter import Block, GgufArchitectures
from pgprune_cli.model.families.llama import LlamaFamily
from pgprune_cli.model.unit_tensors import Part, UnitTensor


class NoDeltaNet(nn.Module):
    """Runs in place of a removed DeltaNet: adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        return torch.zeros_like(hidden_states)


class Qwen35Family(LlamaFamily):
    """The adapter of the dense Qwen3.5 models."""

    def grid(self, layer: nn.Module, block: Block) -> Grid:
        if block == self.recurrent:
            return Grid(_delta_net(layer).num_k_heads, 1)
        return super().grid(layer, block)

    def unit_tensors(self, layer: nn.Module, block: Block) -> tuple[UnitTensor, ...]:
        if block != self.recurrent:
            return super().unit_tensors(layer, block)
        net = _delta_net(layer)
        heads, per_key = net.num_k_heads, net.num_v_heads // net.num_k_heads
        keys, values, numbers = Part(heads, net.head_k_dim), Part(heads, per_key * net.head_v_dim), Part(heads, per_key)
        return (
            UnitTensor("in_proj_qkv.weight", 0, (keys, keys, values)),
            UnitTensor("conv1d.weight", 0, (keys, keys, values)),
            UnitTensor("in_proj_z.weight", 0, (values,)),
            UnitTensor("in_proj_b.weight", 0, (numbers,)),
            UnitTensor("in_proj_a.weight", 0, (numbers,)),
            UnitTensor("A_log", 0, (numbers,)),
            UnitTensor("dt_bias", 0, (numbers,)),
            UnitTensor("out_proj.weight", 1, (values,)),
        )

    def parts(self, block: Block, projection: str, per_element: Part, per_group: Part) -> tuple[Part, ...]:
        if block == self.attention and projection == block.projections[0]:
            return (Part(per_element.runs, 2 * per_element.width),)  # each query head is followed by its output gate
        return super().parts(block, projection, per_element, per_group)

    def settings(self, layer: nn.Module, block: Block, groups: int, members: int) -> list[tuple[nn.Module, str, Any]]:
        if block != self.recurrent:
            return super().settings(layer, block, groups, members)
        net = _delta_net(layer)
        value_width = net.num_v_heads // net.num_k_heads * net.head_v_dim
        return [(net, "key_dim", groups * net.head_k_dim), (net, "value_dim", groups * value_width)]

    def placeholder(self, block: Block) -> nn.Module:
        return NoDeltaNet() if block == self.recurrent else super().placeholder(block)

    def norm_weight(self, norm: nn.Module) -> Tensor:
        return 1 + norm.get_parameter("weight")

    def attention_flops(self, layer: nn.Module, visible_keys: int, context: int) -> dict[str, int]:
        if self.recurrent not in self.blocks_of(layer):
            return super().attention_flops(layer, visible_keys, context)
        # 2 FLOPs per product: a value head's state times the key, plus key times value, times the query. That is token
        # by token; the kernels that take whole chunks of tokens compute more, and are faster.
        return {self.attention.name: 6 * _state_size(layer), self.ffn.name: 0}

    def cache_bytes(self, layer: nn.Module, tokens: int) -> dict[str, int]:
        if self.recurrent not in self.blocks_of(layer):
            return super().cache_bytes(layer, tokens)
        # The states are float32, however many tokens there were; the convolution caches its last inputs.
        net = _delta_net(layer)
        inputs = 2 * net.head_k_dim + net.num_v_heads // net.num_k_heads * net.head_v_dim
        element_size = net.conv1d.weight.element_size()
        cached_inputs = net.conv_kernel_size * inputs * element_size
        return {self.attention.name: 4 * _state_size(layer) + cached_inputs, self.ffn.name: 0}

    def attention_window(self, config: Any, layer: nn.Module, context: int) -> int:
        return context

    def activation_width(self, block: Block, hidden: int, inner: tuple[int, ...], inputs: int) -> int:
        if block != self.recurrent:
            return super().activation_width(block, hidden, inner, inputs)
        # Measured without the kernels of flash-linear-attention, which need less. Whatever the dtype of the model,
        # everything is float32, which counts twice here, in chunks of 64 tokens. Assumes keys as wide as values.
        fused, values, value_heads = inner[0], inner[1], inner[2]
        return 2 * (2 * hidden + fused + 14 * values + 160 * value_heads)

    def recurrent_config(self, config: Any, groups: int) -> dict[str, int]:
        dense = config.to_dict()  # the attributes of a pruned model's config are those of its layers
        per_key_head = dense["linear_num_value_heads"] // dense["linear_num_key_heads"]
        return {"linear_num_key_heads": groups, "linear_num_value_heads": groups * per_key_head}


def _delta_net(layer: nn.Module) -> Any:
    return layer.get_submodule(DELTA_NET.module)


def _state_size(layer: nn.Module) -> int:
    """Return how many numbers the states of all value heads of one key head hold."""
    net = _delta_net(layer)
    size: int = net.num_v_heads // net.num_k_heads * net.head_k_dim * net.head_v_dim
    return size


DELTA_NET = Block(
    name="attention",
    module="linear_attn",
    norms=("input_layernorm",),
    projections=("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
    config_name="attention",
    element_name="DeltaNet key heads",
)

QWEN3_5 = Qwen35Family(
    model_types=("qwen3_5_text",), recurrent=DELTA_NET, gguf={"qwen3_5_text": GgufArchitectures(None, None)}
)
