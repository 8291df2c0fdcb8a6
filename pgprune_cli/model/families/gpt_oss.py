"""gpt-oss: experts with biases whose gates and ups alternate, and a sink logit for every query head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pgprune_cli.model.families.adapter import Block, GgufArchitectures
from pgprune_cli.model.families.experts import ExpertsFamily
from pgprune_cli.model.unit_tensors import Part, UnitTensor


class NoExperts(nn.Module):
    """Runs in place of a removed FFN block: adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


class GptOssFamily(ExpertsFamily):
    """The adapter of gpt-oss. The experts' weights are stored transposed."""

    @property
    def _channel_axis(self) -> int:
        return 1

    def unit_tensors(self, layer: nn.Module, block: Block) -> tuple[UnitTensor, ...]:
        tensors = super().unit_tensors(layer, block)
        if block == self.ffn:
            return tensors
        return UnitTensor("sinks", 0, (Part(self.grid(layer, block).elements, 1),)), *tensors

    def _expert_tensors(self, experts: int, channels: int) -> tuple[UnitTensor, ...]:
        gate_and_up = (Part(channels, 2),)
        return (
            UnitTensor(self.fused, 2, gate_and_up, stacked=True),
            UnitTensor(f"{self.fused}_bias", 1, gate_and_up, stacked=True),
            UnitTensor(f"{self.output}_bias", 0, (Part(experts, 1),)),
            UnitTensor(self.output, self._channel_axis, (Part(channels, 1),), stacked=True),
        )

    def _gate_up(self, experts: Any, expert: int, inputs: Tensor) -> Tensor:
        product: Tensor = inputs @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        return product

    def output_parts(self, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
        weight, _ = super().output_parts(layer)
        return weight, self._tensor(layer, f"{self.output}_bias")

    def placeholder(self, block: Block) -> nn.Module:
        return NoExperts() if block == self.ffn else super().placeholder(block)


GPT_OSS = GptOssFamily(
    model_types=("gpt_oss",),
    expert_sizes=("num_local_experts", "intermediate_size"),
    router="router",
    files={},
    gguf={"gpt_oss": GgufArchitectures(None, None)},
)
