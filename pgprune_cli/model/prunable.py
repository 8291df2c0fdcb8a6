"""Where a model family keeps its prunable projections, and how they are coupled.

An attention unit is a KV head with all the query heads that share it: rows of q, k, v (and of their biases) and the
matching columns of o. An FFN unit is a row of gate and up and the matching column of down. A sub-layer that loses all
its units is gone as a whole, its output bias and norm too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pgprune_cli.core.space import Family, MaskSpace
from pgprune_cli.errors import UserError


@dataclass(frozen=True)
class Projection:
    """A linear layer, by its name inside its block, and the axis of its weight (out, in) along which units lie."""

    name: str
    axis: int


@dataclass(frozen=True)
class Block:
    """A sub-layer: its module, the norm in front of it, its projections, the one that writes to the residual last."""

    module: str
    norm: str
    projections: tuple[Projection, ...]

    @property
    def output(self) -> Projection:
        return self.projections[-1]

    @property
    def output_path(self) -> str:
        """Name of the output projection inside its layer."""
        return f"{self.module}.{self.output.name}"


@dataclass(frozen=True)
class ArchSpec:
    """One way of laying out a decoder, with its final norm; `model_types`: the transformers configs laid out so."""

    model_types: tuple[str, ...]
    layers: str
    norm: str
    attention: Block
    ffn: Block

    def blocks(self) -> tuple[tuple[str, Block], ...]:
        return (("attention", self.attention), ("ffn", self.ffn))


LLAMA_LIKE = ArchSpec(
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    layers="model.layers",
    norm="model.norm",
    attention=Block(
        "self_attn",
        "input_layernorm",
        (Projection("q_proj", 0), Projection("k_proj", 0), Projection("v_proj", 0), Projection("o_proj", 1)),
    ),
    ffn=Block(
        "mlp",
        "post_attention_layernorm",
        (Projection("gate_proj", 0), Projection("up_proj", 0), Projection("down_proj", 1)),
    ),
)

SPECS = (LLAMA_LIKE,)


def spec_of(model_type: str) -> ArchSpec:
    """The layout of a transformers `model_type`. Raises UserError for one that is not supported."""
    for spec in SPECS:
        if model_type in spec.model_types:
            return spec
    if model_type.startswith("pruned_"):
        raise UserError("the model is pruned already; prune the one that it was made from, with another sparsity")
    known = ", ".join(name for spec in SPECS for name in spec.model_types)
    raise UserError(f"model type {model_type!r} is not supported; pgprune prunes {known}")


@dataclass(frozen=True)
class LayerMask:
    """What stays of one decoder layer: bool masks over its KV heads and its FFN channels, True = kept."""

    attention: Tensor
    ffn: Tensor

    def of(self, block: str) -> Tensor:
        return self.attention if block == "attention" else self.ffn


ModelMask = tuple[LayerMask, ...]
"""What stays of a model, layer by layer."""


class Output(NamedTuple):
    """An output projection on its kept inputs: weight `(hidden, kept)`, and bias `(hidden,)` where it has one."""

    weight: Tensor
    bias: Tensor | None


Outputs = Mapping[tuple[int, str], Output]
"""Repaired output projections by (layer, block name); a block without an entry keeps its weights as they are."""


@dataclass(frozen=True)
class UnitCosts:
    """What one unit costs, layer by layer: a KV head, and an FFN channel. Whole numbers of whatever is counted."""

    attention: tuple[int, ...]
    ffn: tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """The sizes of a dense model that pruning needs: units of every layer and parameters of a unit."""

    spec: ArchSpec
    kv_heads: tuple[int, ...]
    channels: tuple[int, ...]
    kv_head_parameters: tuple[int, ...]
    channel_parameters: tuple[int, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Shape:
        """Reads the shape off a transformers causal model (a model on the meta device will do)."""
        spec = spec_of(model.config.model_type)
        layers = model.get_submodule(spec.layers)
        groups = [layer.self_attn.k_proj.out_features // layer.self_attn.head_dim for layer in layers]
        channels = [layer.mlp.down_proj.in_features for layer in layers]
        return cls(
            spec,
            tuple(groups),
            tuple(channels),
            tuple(_unit_parameters(layer, spec.attention, count) for layer, count in zip(layers, groups, strict=True)),
            tuple(_unit_parameters(layer, spec.ffn, count) for layer, count in zip(layers, channels, strict=True)),
        )

    @property
    def parameters(self) -> UnitCosts:
        return UnitCosts(self.kv_head_parameters, self.channel_parameters)

    def space(self, families: Sequence[str], costs: UnitCosts | None = None) -> MaskSpace:
        """The units of the named families (attention, ffn, attention-block, ffn-block, layer) with what they cost.

        In parameters, where `costs` says nothing else. A whole block or layer costs the sum of its units.
        """
        costs = costs or self.parameters
        ones = (1,) * len(self.kv_heads)
        whole_attention = tuple(n * c for n, c in zip(self.kv_heads, costs.attention, strict=True))
        whole_ffn = tuple(n * c for n, c in zip(self.channels, costs.ffn, strict=True))
        known = {
            "attention": (self.kv_heads, costs.attention),
            "ffn": (self.channels, costs.ffn),
            "attention-block": (ones, whole_attention),
            "ffn-block": (ones, whole_ffn),
            "layer": (ones, tuple(a + f for a, f in zip(whole_attention, whole_ffn, strict=True))),
        }
        return MaskSpace(tuple(Family(name, *known[name]) for name in families))

    def keep(self, space: MaskSpace, mask: Tensor) -> ModelMask:
        """A mask `(n,)` over the space's units as what stays of every layer; families not in the space stay whole."""
        attention = [torch.ones(count, dtype=torch.bool) for count in self.kv_heads]
        ffn = [torch.ones(count, dtype=torch.bool) for count in self.channels]
        for family in space.families:
            for index, part in enumerate(space.per_layer(mask, family.name)):
                if family.name in ("attention", "attention-block", "layer"):
                    attention[index] = attention[index] & part
                if family.name in ("ffn", "ffn-block", "layer"):
                    ffn[index] = ffn[index] & part
        return tuple(LayerMask(a, f) for a, f in zip(attention, ffn, strict=True))


def projections(spec: ArchSpec, layer: nn.Module) -> Iterator[tuple[str, Projection, nn.Linear]]:
    """(block name, projection, module) of every prunable linear layer of a decoder layer."""
    for name, block in spec.blocks():
        module = layer.get_submodule(block.module)
        for projection in block.projections:
            yield name, projection, module.get_submodule(projection.name)


def gather_units(tensor: Tensor, axis: int, kept: Tensor, units: int) -> Tensor:
    """The kept units of a weight or bias whose `axis` holds `units` equal runs, one a unit.

    `kept` holds unit indices (int64, ascending) on the tensor's device. Returns a new tensor, with
    `len(kept) · width` entries along `axis`.
    """
    width = tensor.shape[axis] // units
    if width == 1:
        # Whole rows of the transposed matrix: on a CPU three times as fast as picking columns.
        return tensor.movedim(axis, 0).index_select(0, kept).movedim(0, axis)
    runs = tensor.unflatten(axis, (units, width))
    return runs.index_select(axis, kept).flatten(axis, axis + 1)


def inputs_of(units: Tensor, width: int) -> Tensor:
    """The inputs of an output projection that belong to some units, each a run of `width`, by index; in their order."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def _unit_parameters(layer: nn.Module, block: Block, units: int) -> int:
    """Parameters that go with one unit: its share of every weight, and of the biases along the same axis."""
    total = 0
    for projection in block.projections:
        linear = layer.get_submodule(f"{block.module}.{projection.name}")
        assert isinstance(linear, nn.Linear)
        total += linear.in_features * linear.out_features
        if linear.bias is not None and projection.axis == 0:
            total += linear.bias.numel()
    return total // units
