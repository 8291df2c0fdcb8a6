"""Tiny models of every family with unequal layers, cut by hand from a dense one, which is the reference.

The cut follows the shapes of the tensors, and shares no code with pgprune's adapters and exports.
"""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn

from helpers.models import tiny_model
from pgprune_cli.serving.modeling_pruned import FAMILIES

HEAD_DIM, KV_HEADS, QUERY_HEADS, CHANNELS, EXPERTS, EXPERT_CHANNELS = 8, 4, 8, 24, 8, 12


@dataclass(frozen=True)
class Kept:
    """What a layer keeps: KV heads (or key heads), query heads (or value heads), channels and experts.

    heads: empty without attention; channels: empty without an FFN; expert_channels: those of each kept expert.
    """

    kv_heads: tuple[int, ...]
    heads: tuple[int, ...]
    channels: tuple[int, ...]
    expert_channels: dict[int, tuple[int, ...]]


def kept(kv_heads: tuple[int, ...], members: tuple[int, ...], channels: int, experts: int, width: int) -> Kept:
    """Return a layer with the given KV heads, query heads of each, and numbers of channels, experts and widths."""
    order = torch.Generator().manual_seed(17 * channels + experts)

    def some(count: int, of: int) -> tuple[int, ...]:
        return tuple(sorted(torch.randperm(of, generator=order)[:count].tolist()))

    heads = tuple(2 * head + member for head in kv_heads for member in members)
    channel_list = some(channels, CHANNELS)
    experts_kept = some(experts if channels else 0, EXPERTS)
    return Kept(kv_heads, heads, channel_list, {expert: some(width, EXPERT_CHANNELS) for expert in experts_kept})


VARIANTS = {
    "no attention at first": (
        kept((), (), 16, 8, 5),
        kept((0, 2, 3), (1,), 9, 5, 12),
        kept((1, 3), (0, 1), 0, 0, 0),
        kept((0, 1, 2, 3), (0, 1), 24, 3, 7),
    ),
    "a layer fewer": (
        kept((2,), (0,), 7, 8, 8),
        kept((), (), 0, 0, 0),
        kept((), (), 20, 4, 8),
        kept((0, 3), (0, 1), 24, 6, 8),
    ),
}
"""What every layer keeps. A layer that keeps nothing is not written."""


def rows(units: tuple[int, ...], width: int, start: int = 0) -> list[int]:
    return [start + unit * width + row for unit in units for row in range(width)]


def cut(name: str, tensor: Tensor, layer: Kept) -> Tensor:
    """Return what a layer keeps of its tensor. name: without the layer's prefix."""
    module, _, leaf = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")
    queries, keys = rows(layer.heads, HEAD_DIM), rows(layer.kv_heads, HEAD_DIM)
    head_rows, key_rows = QUERY_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    if module == "mlp.experts":
        return cut_experts(leaf, tensor, layer)
    if module == "linear_attn":
        mixed = keys + [key_rows + row for row in keys] + [2 * key_rows + row for row in queries]
        heads = list(layer.heads)
        axes = {"in_proj_qkv": mixed, "conv1d": mixed, "in_proj_z": queries, "in_proj_b": heads, "in_proj_a": heads}
        axes |= {"dt_bias": heads, "A_log": heads}
        if leaf == "out_proj" and tensor.dim() == 2:
            return tensor[:, queries]
        return tensor[axes[leaf]] if leaf in axes else tensor
    channels = list(layer.channels)
    match leaf:
        case "q_proj":
            return tensor[rows(layer.heads, tensor.shape[0] // QUERY_HEADS)]  # Qwen3.5 has gates between the queries
        case "k_proj" | "v_proj":
            return tensor[keys]
        case "qkv_proj":
            return tensor[queries + [head_rows + row for row in keys] + [head_rows + key_rows + row for row in keys]]
        case "q_norm" | "k_norm":
            return tensor if len(tensor) == HEAD_DIM else tensor[queries if leaf == "q_norm" else keys]
        case "o_proj":
            return tensor[:, queries] if tensor.dim() == 2 else tensor
        case "sinks":
            return tensor[list(layer.heads)]
        case "gate_proj" | "up_proj":
            return tensor[channels]
        case "gate_up_proj":
            return tensor[channels + [CHANNELS + channel for channel in channels]]
        case "down_proj":
            return tensor[:, channels] if tensor.dim() == 2 else tensor
        case "gate" | "router":
            return tensor[list(layer.expert_channels)]
    return tensor


def cut_experts(leaf: str, tensor: Tensor, layer: Kept) -> Tensor:
    """Return what a layer keeps of a tensor `(experts, ...)`: whole experts, and of each some channels."""
    parts = []
    for expert, channels in layer.expert_channels.items():
        part, gate, up = tensor[expert], list(channels), [EXPERT_CHANNELS + channel for channel in channels]
        pairs = rows(channels, 2)  # gpt-oss alternates gates and ups
        transposed = tensor.shape[1:] != (2 * EXPERT_CHANNELS, 32) if leaf == "gate_up_proj" else tensor.shape[1] == 12
        match leaf:
            case "gate_up_proj":
                part = part[:, pairs] if transposed else part[gate + up]
            case "gate_up_proj_bias":
                part = part[pairs]
            case "down_proj":
                part = part[gate] if transposed else part[:, gate]
        parts.append(part)
    return torch.stack(parts)


def attention_of(layer: nn.Module) -> tuple[nn.Module, str]:
    """Return the attention block and the name of its output projection."""
    return (layer.linear_attn, "out_proj") if hasattr(layer, "linear_attn") else (layer.self_attn, "o_proj")


def zero_removed(layer: nn.Module, keep: Kept) -> None:
    """Zero the output columns of what a dense layer must not keep, and keep its router and norms from using it."""
    attention, output = attention_of(layer)
    linear = getattr(attention, output)
    removed = [row for row in range(linear.in_features) if row not in rows(keep.heads, HEAD_DIM)]
    linear.weight[:, removed] = 0
    if not keep.heads and linear.bias is not None:
        linear.bias.zero_()
    for norm, units in (("q_norm", keep.heads), ("k_norm", keep.kv_heads)):
        if hasattr(attention, norm) and getattr(attention, norm).weight.numel() > HEAD_DIM and units:
            norm_only(getattr(attention, norm), rows(units, HEAD_DIM))
    if not hasattr(layer.mlp, "experts"):
        layer.mlp.down_proj.weight[:, [row for row in range(CHANNELS) if row not in keep.channels]] = 0
        if not keep.channels and layer.mlp.down_proj.bias is not None:
            layer.mlp.down_proj.bias.zero_()
        return
    experts = layer.mlp.experts
    down = experts.down_proj if experts.down_proj.shape[1] == EXPERT_CHANNELS else experts.down_proj.transpose(1, 2)
    for expert in range(EXPERTS):
        used = keep.expert_channels.get(expert, ())
        down[expert, [channel for channel in range(EXPERT_CHANNELS) if channel not in used]] = 0
    if keep.expert_channels:
        router = layer.mlp.router if hasattr(layer.mlp, "router") else layer.mlp.gate
        route_only(router, [expert for expert in range(EXPERTS) if expert not in keep.expert_channels])
    elif hasattr(experts, "down_proj_bias"):
        experts.down_proj_bias.zero_()


def norm_only(norm: nn.Module, kept_rows: list[int]) -> None:
    """Let a norm over all heads take its statistic from these rows."""

    def forward(states: Tensor) -> Tensor:
        square = states[..., kept_rows].pow(2).mean(-1, keepdim=True)
        return norm.weight * states * torch.rsqrt(square + norm.variance_epsilon)

    norm.forward = forward


def route_only(router: nn.Module, removed: list[int]) -> None:
    """Let a router never choose the removed experts."""
    plain, linear = router.forward, nn.functional.linear

    def forward(hidden_states: Tensor):
        def without(*arguments):
            return linear(*arguments).index_fill(-1, torch.tensor(removed, dtype=torch.long), float("-inf"))

        with mock.patch.object(nn.functional, "linear", without):
            return plain(hidden_states)

    router.forward = forward


def add_biases(dense: nn.Module, variant: tuple[Kept, ...]) -> list[str]:
    """Give every output projection a bias where the dense model has none, and return the blocks that have some."""
    generator = torch.Generator().manual_seed(5)
    blocks = ["attention"] if hasattr(dense.model.layers[0].mlp, "experts") else ["attention", "mlp"]
    for layer, keep in zip(dense.model.layers, variant, strict=True):
        for block, units in (("attention", keep.heads), ("mlp", keep.channels)):
            module, output = attention_of(layer) if block == "attention" else (layer.mlp, "down_proj")
            if block in blocks and units:
                bias = torch.randn(dense.config.hidden_size, generator=generator)
                getattr(module, output).bias = nn.Parameter(bias, requires_grad=False)
    return blocks


def layer_sizes(keep: Kept, linear: bool) -> dict:
    """Return a layer's entry in per_layer_config. linear: True if its attention is linear."""
    names = (
        ("linear_num_value_heads", "linear_num_key_heads") if linear else ("num_attention_heads", "num_key_value_heads")
    )
    sizes = dict(zip(names, (len(keep.heads), len(keep.kv_heads)), strict=True)) if keep.heads else {}
    skip = [block for block, units in (("attention", keep.heads), ("mlp", keep.channels)) if not units]
    return sizes | ({"skip": skip} if skip else {})


def mlp_sizes(model_type: str, keep: Kept) -> dict:
    if not keep.channels:
        return {}
    if model_type not in ("mixtral", "qwen3_moe", "gpt_oss"):
        return {"intermediate_size": len(keep.channels)}
    width = "moe_intermediate_size" if model_type == "qwen3_moe" else "intermediate_size"
    count = "num_experts" if model_type == "qwen3_moe" else "num_local_experts"
    return {count: len(keep.expert_channels), width: len(next(iter(keep.expert_channels.values())))}


@torch.no_grad()
def dense_and_pruned(architecture: str, variant: str, biases: bool = False) -> tuple[nn.Module, nn.Module]:
    """Return a dense model that computes what the pruned one must, and the pruned one, both float32 in eval mode."""
    keeps = VARIANTS[variant]
    dense = tiny_model(architecture)
    output_biases = add_biases(dense, keeps) if biases else []
    model_type, config = dense.config.model_type, dense.config.to_dict()
    written = [index for index, keep in enumerate(keeps) if keep.heads or keep.channels]
    types, config["head_dim"] = config.get("layer_types"), HEAD_DIM
    with_heads = [index for index in written if keeps[index].heads]
    if types:
        shared = next(types[index] for index in with_heads if types[index] != "linear_attention")
        config["layer_types"] = [types[index] if index in with_heads else shared for index in written]
    if "no_rope_layers" in config:
        config["no_rope_layers"] = [config["no_rope_layers"][index] for index in written]
    layers = {}
    for position, index in enumerate(written):
        linear = bool(types) and types[index] == "linear_attention"
        layers[str(position)] = layer_sizes(keeps[index], linear) | mlp_sizes(model_type, keeps[index])
    config |= {"num_hidden_layers": len(written), "per_layer_config": layers}
    config |= {"output_biases": output_biases} if output_biases else {}
    causal = FAMILIES[model_type]
    values = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    pruned = causal(causal.config_class(**values))
    state = dense.state_dict()
    for name in pruned.state_dict():
        if name.startswith("model.layers."):
            index, _, rest = name.removeprefix("model.layers.").partition(".")
            source = written[int(index)]
            tensor = cut(rest, state[f"model.layers.{source}.{rest}"], keeps[source])
        else:
            tensor = state[name]
        target = pruned.get_parameter(name)
        assert target.shape == tensor.shape, name
        target.copy_(tensor)
    for layer, keep in zip(dense.model.layers, keeps, strict=True):
        zero_removed(layer, keep)
    return dense, pruned.eval().requires_grad_(False)
