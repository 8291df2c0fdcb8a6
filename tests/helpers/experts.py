"""Mixtures of experts in the slow and obvious way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH_MULTIPLE = 4
"""transformers multiplies the matrices of all experts at once if their rows are a multiple of 16 bytes (4 floats)."""


def router_of(layer: nn.Module) -> Any:
    """Return the router of a layer, `gate` or `router`."""
    mlp: Any = layer.mlp
    return mlp.router if hasattr(mlp, "router") else mlp.gate


def routing(router: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gates `(N, k)` and the experts `(N, k)` of logits `(N, experts)`, as each family defines them."""
    if getattr(router, "bias", None) is not None:  # gpt-oss: the softmax comes last
        values, chosen = logits.topk(router.top_k, -1)
        return values.softmax(-1), chosen
    values, chosen = logits.float().softmax(-1).topk(router.top_k, -1)
    return values / values.sum(-1, keepdim=True), chosen


def activations(layer: nn.Module, expert: int, inputs: Tensor) -> Tensor:
    """Return what the output projection of one expert sees for inputs `(N, hidden)`: `(N, channels)`."""
    experts: Any = layer.mlp.experts
    weight = experts.gate_up_proj[expert]
    if not hasattr(experts, "gate_up_proj_bias"):
        gate, up = (inputs @ weight.T).chunk(2, -1)
        return functional.silu(gate) * up
    both = inputs @ weight + experts.gate_up_proj_bias[expert]
    gate, up = both[:, ::2].clamp(max=experts.limit), both[:, 1::2].clamp(-experts.limit, experts.limit)
    return (up + 1) * gate * torch.sigmoid(gate * experts.alpha)


def output_of(layer: nn.Module, expert: int) -> tuple[Tensor, Tensor]:
    """Return the output projection `(hidden, channels)` of one expert, and its bias `(hidden,)`."""
    experts: Any = layer.mlp.experts
    if not hasattr(experts, "down_proj_bias"):
        weight: Tensor = experts.down_proj[expert]
        return weight, torch.zeros(len(weight))
    return experts.down_proj[expert].T, experts.down_proj_bias[expert]


def mask_experts(layer: nn.Module, mask: Tensor) -> list[Callable[[], None]]:
    """Set the router's logits of removed experts to −inf and the columns of removed channels to zero.

    Returns what undoes it, in order.
    """
    weight, router = layer.mlp.experts.down_proj, router_of(layer)
    kept = mask.view(len(weight), -1)
    transposed = hasattr(layer.mlp.experts, "down_proj_bias")
    dense = weight.data
    weight.data = dense * (kept[:, :, None] if transposed else kept[:, None, :])

    def reroute(_: nn.Module, __: object, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits = output[0].masked_fill(~kept.any(1), -torch.inf)
        return logits, *routing(router, logits)

    handle = router.register_forward_hook(reroute)

    def restore() -> None:
        weight.data = dense

    return [handle.remove, restore]
