"""Mixtures of experts: a Llama whose FFN blocks consist of a router and of experts with weights in 3-D tensors.

The elements of such a block are experts × channels. An expert takes its router row along. All experts of a layer keep
the same number of channels, because their weights share one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pgprune_cli.core.grid import Grid
from pgprune_cli.model.families.adapter import Block, FilePiece, Matrices
from pgprune_cli.model.families.llama import FFN, LlamaFamily
from pgprune_cli.model.unit_tensors import Part, UnitTensor

EXPERTS = replace(FFN, element_name="expert channels", group_name="experts")

ROW_BYTES = 16
"""transformers' grouped kernels need rows of a multiple of this number of bytes."""


class Routed(NamedTuple):
    """The tokens of one expert: their places `(n,)` int64, their gates `(n,)`, and the expert's activations `(n, I)`.

    The activations are the inputs of its output projection.
    """

    expert: int
    tokens: Tensor
    gates: Tensor
    activations: Tensor


@dataclass(frozen=True, kw_only=True)
class ExpertsFamily(LlamaFamily):
    """The adapter of a mixture of experts, laid out like a Llama otherwise. Some layers may have a dense FFN.

    router: the router's name inside the FFN; expert_sizes: the config's keys for the number of experts and for the
    channels of each; fused: name of the tensor in which every expert has its gate and up projections; output: name of
    the tensor of their output projections; files: by file name of a matrix of one expert, the tensor and the part of it
    that holds it, empty if files hold the tensors themselves; renamed: what files call the FFN's module, if not `mlp`.
    """

    ffn: Block = EXPERTS
    router: str = "gate"
    expert_sizes: tuple[str, str]
    fused: str = "experts.gate_up_proj"
    output: str = "experts.down_proj"
    files: Mapping[str, tuple[str, int]] = field(hash=False)
    renamed: str | None = None

    def groups_per_token(self, layer: nn.Module, block: Block) -> int | None:
        if block != self.ffn or not hasattr(layer.get_submodule(block.module), "experts"):
            return None
        router: Any = self._router(layer)
        top_k: int = router.top_k
        return top_k

    def grid(self, layer: nn.Module, block: Block) -> Grid:
        top_k = self.groups_per_token(layer, block)
        if top_k is None:
            return super().grid(layer, block)
        weight = self._tensor(layer, self.output)
        experts, channels = len(weight), weight.shape[self._channel_axis]
        return Grid(experts, channels, min_groups=min(top_k, experts), separate=True)

    @property
    def _channel_axis(self) -> int:
        """The axis of the output projections that holds the channels."""
        return 2

    def unit_tensors(self, layer: nn.Module, block: Block) -> tuple[UnitTensor, ...]:
        if self.groups_per_token(layer, block) is None:
            return super().unit_tensors(layer, block)
        grid = self.grid(layer, block)
        expert = (Part(grid.groups, 1),)
        router = [UnitTensor(f"{self.router}.{name}", 0, expert) for name, _ in self._router(layer).named_parameters()]
        return *router, *self._expert_tensors(grid.groups, grid.members)

    def _expert_tensors(self, experts: int, channels: int) -> tuple[UnitTensor, ...]:
        """Return the tensors that hold the experts' weights, the output projections last."""
        channel = Part(channels, 1)
        return (
            UnitTensor(self.fused, 1, (channel, channel), stacked=True),
            UnitTensor(self.output, self._channel_axis, (channel,), stacked=True),
        )

    def settings(self, layer: nn.Module, block: Block, groups: int, members: int) -> list[tuple[nn.Module, str, Any]]:
        top_k = self.groups_per_token(layer, block)
        if top_k is None:
            return super().settings(layer, block, groups, members)
        values = {"num_experts": groups, "top_k": min(top_k, groups)}
        values |= {"intermediate_dim": members, "intermediate_size": members}
        module = layer.get_submodule(block.module)
        experts: Any = module.get_submodule("experts")
        owners = (module, self._router(layer), experts)
        settings: list[tuple[nn.Module, str, Any]] = [
            (owner, name, value) for owner in owners for name, value in values.items() if hasattr(owner, name)
        ]
        if members * experts.down_proj.element_size() % ROW_BYTES:
            settings.append((experts.config, "_experts_implementation", "eager"))
        return settings

    def activation_width(self, block: Block, hidden: int, inner: tuple[int, ...], inputs: int) -> int:
        if (
            block == self.ffn and inner[0] == 2 * inputs
        ):  # a token's hidden state and output exist for each of its experts
            return 4 * hidden + len(inner) * max(hidden + 4 * inputs, 4 * hidden)
        return super().activation_width(block, hidden, inner, inputs)

    def matrices(self, layer: nn.Module, block: Block) -> Matrices:
        if self.groups_per_token(layer, block) is None:
            return super().matrices(layer, block)
        grid = self.grid(layer, block)
        matrices: Matrices = {}
        for tensor in self.unit_tensors(layer, block):
            values = self._tensor(layer, tensor.name)
            if tensor.name == self.output:  # (hidden, experts · channels)
                matrices[tensor.name] = values.movedim(self._channel_axis, 1).flatten(0, 1).T, ()
            elif tensor.stacked and values.dim() == 3:  # gates and ups: part by part, expert by expert
                rows = values.movedim(tensor.axis, 1)
                by_part = rows.split([part.rows for part in tensor.parts], 1)
                parts = tuple(replace(part, runs=grid.elements) for part in tensor.parts)
                matrices[tensor.name] = torch.cat([part.flatten(0, 1) for part in by_part]), parts
            elif values.dim() == 2 and not tensor.name.startswith("experts."):
                matrices[tensor.name] = values, tensor.parts
        return matrices

    def routed(self, layer: nn.Module, inputs: Tensor, kept: Tensor | None = None) -> Iterator[Routed]:
        """Yield what every expert of a layer does with the tokens that the router sends to it.

        inputs: of the FFN, `(N, hidden)`; kept: if given, the router chooses only among these experts `(g,)` int64.
        """
        module: Any = layer.get_submodule(self.ffn.module)
        with _restricted(self._router(layer), kept) as router:
            _, gates, chosen = router(inputs)
        if kept is not None:
            chosen = kept.to(chosen.device)[chosen]
        for expert in range(self.grid(layer, self.ffn).groups):
            tokens, place = (chosen == expert).nonzero(as_tuple=True)
            activations = module.experts._apply_gate(self._gate_up(module.experts, expert, inputs[tokens]))
            yield Routed(expert, tokens, gates[tokens, place], activations)

    def _gate_up(self, experts: Any, expert: int, inputs: Tensor) -> Tensor:
        """Return the gate and up projections of one expert, `(n, 2 · channels)`."""
        return functional.linear(inputs, experts.gate_up_proj[expert])

    def output_parts(self, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Return the experts' output projections `(experts, hidden, channels)` and biases `(experts, hidden)`."""
        return self._tensor(layer, self.output).movedim(self._channel_axis, 2), None

    def stored_output(self, weight: Tensor) -> Tensor:
        """Return output projections `(experts, hidden, channels)` as the model stores them."""
        return weight.movedim(2, self._channel_axis).contiguous()

    def output_size(self, layer: nn.Module, block: Block) -> int:
        if self.groups_per_token(layer, block) is None:
            return super().output_size(layer, block)
        return self._tensor(layer, self.output).numel()

    def output_weights(self, block: Block) -> tuple[str, ...]:
        dense = super().output_weights(block)
        return (*dense, f"{block.module}.{self.output}") if block == self.ffn else dense

    def layer_config(self, config: Any, kept: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        experts, channels = kept[self.ffn.name]
        sizes = super().layer_config(config, kept)
        if not experts:
            return sizes
        if experts > 1:
            del sizes["intermediate_size"]  # one group may also be a dense FFN: each layer reads the key of its kind
        count, width = self.expert_sizes
        top_k = min(config.num_experts_per_tok, experts)
        return sizes | {count: experts, width: channels, "num_experts_per_tok": top_k}

    def renumbered(self, config: Any, layers: Sequence[int]) -> dict[str, Any]:
        if not hasattr(config, "mlp_only_layers"):
            return {}
        is_dense = [i in config.mlp_only_layers or bool((i + 1) % config.decoder_sparse_step) for i in layers]
        return {"mlp_only_layers": [place for place, dense in enumerate(is_dense) if dense], "decoder_sparse_step": 1}

    def stock_config(self, config: Any, kept: Mapping[str, tuple[int, int]]) -> dict[str, Any] | None:
        # With dense layers, the layers do not have the same sizes even in the base model.
        has_dense_layers = getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) > 1
        return None if has_dense_layers else super().stock_config(config, kept)

    def file_piece(self, name: str) -> FilePiece:
        layer, path = _layer_path(self.layers, name)
        if layer is None:
            return super().file_piece(name)
        stored = self.renamed or self.ffn.module
        prefix, module = f"{self.layers}.{layer}.", f"{stored}."
        if not path.startswith(module):
            return super().file_piece(name)
        match = re.fullmatch(r"experts\.(\d+)\.(\w+)\.weight", path.removeprefix(module))
        if match is None or match[2] not in self.files:
            return FilePiece(
                f"{prefix}{self.ffn.module}.{path.removeprefix(module)}", f"{self.layers}.{{layer}}.{path}"
            )
        tensor, part = self.files[match[2]]
        template = f"{self.layers}.{{layer}}.{module}experts.{{group}}.{match[2]}.weight"
        return FilePiece(f"{prefix}{self.ffn.module}.{tensor}", template, int(match[1]), part)

    def _router(self, layer: nn.Module) -> nn.Module:
        return layer.get_submodule(f"{self.ffn.module}.{self.router}")

    def _tensor(self, layer: nn.Module, name: str) -> Tensor:
        return layer.get_submodule(self.ffn.module).get_parameter(name)


def _layer_path(layers: str, name: str) -> tuple[int | None, str]:
    """Return the layer that a tensor belongs to, None for one outside of the layers, and its path inside the layer."""
    match = re.fullmatch(re.escape(layers) + r"\.(\d+)\.(.+)", name)
    return (int(match[1]), match[2]) if match else (None, name)


@contextmanager
def _restricted(router: nn.Module, kept: Tensor | None) -> Iterator[nn.Module]:
    """Let a router choose only among some of its experts `(g,)` inside the `with`. It numbers them from 0."""
    attributes: Any = router
    if kept is None:
        yield router
        return
    weights, top_k = {parameter: parameter.data for parameter in router.parameters()}, attributes.top_k
    try:
        for parameter, values in weights.items():
            parameter.data = values[kept.to(values.device)]
        attributes.top_k = min(top_k, len(kept))
        yield router
    finally:
        attributes.top_k = top_k
        for parameter, values in weights.items():
            parameter.data = values
