"""What pgprune has to know about a model family: where its blocks are, and which rows of which tensors make up a unit.

A decoder layer has two blocks. The elements of a block are a grid of groups × members (core/grid.py): the *attention*
block consists of KV heads with the query heads that share them, the *ffn* block of channels, or of experts with their
channels. A block that loses all its elements is removed as a whole, with its norms and its output bias.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pgprune_cli.core.grid import Grid
from pgprune_cli.model.unit_tensors import Part, UnitTensor

PRUNED = "pruned_"
"""What the model type of an export with unequal layers begins with."""


def dense_type(model_type: str) -> str:
    """Return the model type of the dense model that a model of this type was pruned from, possibly itself."""
    return model_type.removeprefix(PRUNED)


def dense_config(config: Any) -> Any:
    """Return the config with the dense model's sizes in every layer, for code that reads one size for all of them."""
    return config.of_layer({}) if config.model_type.startswith(PRUNED) else config


@dataclass(frozen=True)
class Block:
    """A block of a decoder layer.

    name: `attention` or `ffn`; module: its path inside the layer; norms: the paths of the norms that belong to it
    alone; projections: its linear layers, the one that writes to the residual stream last; post_norm: the path of the
    norm that its output passes before it is added to the residual stream, if any; config_name: what `per_layer_config`
    of an export calls the block; element_name, group_name: what people call its elements and their groups, in the
    plural.
    """

    name: str
    module: str
    norms: tuple[str, ...]
    projections: tuple[str, ...]
    config_name: str
    element_name: str
    group_name: str = ""
    post_norm: str | None = None

    @property
    def output(self) -> str:
        """Name, inside the block's module, of the projection that writes to the residual stream."""
        return self.projections[-1]

    @property
    def output_path(self) -> str:
        """Path of the output projection inside its layer."""
        return f"{self.module}.{self.output}"

    def linears(self, layer: nn.Module) -> list[nn.Linear]:
        """Return the linear layers of this block in a decoder layer, in the order of `projections`."""
        module = layer.get_submodule(self.module)
        return [_linear(module, projection) for projection in self.projections]

    def output_linear(self, layer: nn.Module) -> nn.Linear:
        """Return the output projection of this block in a decoder layer."""
        return _linear(layer, self.output_path)

    @property
    def output_bias(self) -> str:
        """Name of the output's bias inside the block's module. Not every model has it."""
        return f"{self.output}.bias"

    def tensor_prefixes(self) -> tuple[str, ...]:
        """Return what the names of this block's tensors begin with, inside their layer."""
        return f"{self.module}.", *(f"{norm}." for norm in self.norms)


Matrices = dict[str, tuple[Tensor, tuple[Part, ...]]]
"""By name, the weights of a block as matrices `(out, in)`, and what their rows are."""


@dataclass(frozen=True)
class FilePiece:
    """What a tensor of a model's files holds: a tensor of the model, or one group's rows of one of its parts.

    tensor: its name in the model; template: its name in files, with {layer} and {group} for their numbers; group, part:
    None if the file holds the whole tensor.
    """

    tensor: str
    template: str
    group: int | None = None
    part: int | None = None


@dataclass(frozen=True)
class GgufArchitectures:
    """llama.cpp's architectures for one model type.

    equal: for a model whose layers all have the same sizes, None if llama.cpp has none; unequal: for any other.
    """

    equal: str | None
    unequal: str | None


@dataclass(frozen=True, kw_only=True)
class ModelFamily(ABC):
    """An adapter: one way of laying out a decoder.

    model_types: the transformers configs laid out so; the paths of modules of the causal model: layers (a list),
    embedding, final_norm, rotary, head; attention, ffn: the blocks of a layer; residual: path, inside a layer, of the
    module whose input is the residual stream between the two blocks; layer_lists: the keys of the config whose lists
    have one entry per layer; gguf: by model type, what GGUF exports are called; bos_types: the model types that were
    trained with a BOS token at the beginning of every text; recurrent: the attention block of the layers that have a
    state of constant size in place of a KV cache, if there are any.
    """

    model_types: tuple[str, ...]
    layers: str
    embedding: str
    final_norm: str
    rotary: str
    head: str
    attention: Block
    ffn: Block
    residual: str
    layer_lists: tuple[str, ...] = ("layer_types",)
    gguf: Mapping[str, GgufArchitectures] = field(hash=False)
    bos_types: tuple[str, ...] = ()
    recurrent: Block | None = None

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of a layer, in the order in which they run. Some layers have `recurrent` for their attention."""
        return (self.attention, self.ffn)

    @property
    def kinds(self) -> tuple[Block, ...]:
        """Every block that a layer may have. A layer has one attention block of two."""
        return (self.attention, *(() if self.recurrent is None else (self.recurrent,)), self.ffn)

    def block(self, name: str) -> Block:
        """Return the block of that name. Raises KeyError."""
        return {block.name: block for block in self.blocks}[name]

    @property
    def head_weight(self) -> str:
        """Name of the tensor that files of a model with tied embeddings may lack."""
        return f"{self.head}.weight"

    @property
    def embedding_weight(self) -> str:
        return f"{self.embedding}.weight"

    def blocks_of(self, layer: nn.Module) -> tuple[Block, ...]:
        """Return the blocks that a layer has, in the order in which they run. A pruned model may lack one or both."""
        return tuple(block for block in self.kinds if _has_parameters(layer, block.module))

    def linears(self, layer: nn.Module) -> Iterator[tuple[Block, str, nn.Linear]]:
        """Yield every prunable linear layer of a decoder layer with its block and its name in it. Experts have none."""
        for block in self.blocks_of(layer):
            if self.groups_per_token(layer, block) is not None:
                continue
            for projection, linear in zip(block.projections, block.linears(layer), strict=True):
                yield block, projection, linear

    def refusal(self, model_type: str, block: str) -> str:
        """Return why the units of a block cannot be removed one by one in this model type, "" if they can.

        The block as a whole can be removed in any case.
        """
        return ""

    def groups_per_token(self, layer: nn.Module, block: Block) -> int | None:
        """Return how many groups of a block a token uses if a router chooses them (experts), None if it uses all."""
        return None

    def matrices(self, layer: nn.Module, block: Block) -> Matrices:
        """Return the weights of a block, the output projection last. What its columns are is not said."""
        parts = {tensor.module: tensor.parts for tensor in self.unit_tensors(layer, block)}
        linears = zip(block.projections, block.linears(layer), strict=True)
        return {name: (linear.weight, parts[name]) for name, linear in linears}

    def output_size(self, layer: nn.Module, block: Block) -> int:
        """Return the number of weights of a block's output projection."""
        linear = block.output_linear(layer)
        return linear.in_features * linear.out_features

    def output_weights(self, block: Block) -> tuple[str, ...]:
        """Return the names, inside a layer, that the weight of a block's output projection may have."""
        return (f"{block.output_path}.weight",)

    def renumbered(self, config: Any, layers: Sequence[int]) -> dict[str, Any]:
        """Return what changes in the config if just these `layers` are written, apart from `layer_lists`."""
        return {}

    def file_piece(self, name: str) -> FilePiece:
        """Return what the tensor `name` of a model's files holds."""
        prefix = f"{self.layers}."
        layer, _, path = name.removeprefix(prefix).partition(".")
        in_layer = name.startswith(prefix) and layer.isdecimal()
        return FilePiece(name, f"{prefix}{{layer}}.{path}" if in_layer else name)

    @abstractmethod
    def grid(self, layer: nn.Module, block: Block) -> Grid:
        """Return the grid of a block of a dense layer."""

    @abstractmethod
    def unit_tensors(self, layer: nn.Module, block: Block) -> tuple[UnitTensor, ...]:
        """Return every tensor of a block of a dense layer whose rows belong to elements, the output's weight last."""

    @abstractmethod
    def settings(self, layer: nn.Module, block: Block, groups: int, members: int) -> list[tuple[nn.Module, str, Any]]:
        """Return the attributes (module, name, value) of a block with this number of groups and of members in each.

        Only what its forward pass does not read off its tensors.
        """

    @abstractmethod
    def placeholder(self, block: Block) -> nn.Module:
        """Return a module that runs in place of a removed block: it adds nothing to the residual stream."""

    def norm_weight(self, norm: nn.Module) -> Tensor:
        """Return what a norm multiplies its normalised input with, `(hidden,)` in its dtype."""
        return norm.get_parameter("weight")

    def finish_logits(self, config: Any, logits: Tensor) -> Tensor:
        """Return the model's logits, given what its head computes. May change its argument."""
        return logits

    def logit_slopes(self, config: Any, logits: Tensor) -> Tensor | None:
        """Return the derivatives of the model's `logits` by what its head computes, None if they are all equal."""
        return None

    @abstractmethod
    def attention_flops(self, layer: nn.Module, visible_keys: int, context: int) -> dict[str, int]:
        """Return the FLOPs per token and element, by block name, that are not products with weights.

        visible_keys: summed over all queries of a sequence of `context` tokens.
        """

    @abstractmethod
    def cache_bytes(self, layer: nn.Module, tokens: int) -> dict[str, int]:
        """Return the bytes of the KV cache per group, by block name, for `tokens` cached tokens."""

    @abstractmethod
    def attention_window(self, config: Any, layer: nn.Module, context: int) -> int:
        """Return how many keys the last of `context` tokens sees in this layer."""

    @abstractmethod
    def activation_width(self, block: Block, hidden: int, inner: tuple[int, ...], inputs: int) -> int:
        """Return how many activations per token exist at the same time while a dense block runs, at most.

        inner: the output widths of the inner projections; inputs: the input width of the output projection.
        """

    @abstractmethod
    def head_dim(self, config: Any) -> int:
        """Return how many channels a head has."""

    @abstractmethod
    def layer_config(self, config: Any, kept: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        """Return the sizes of a layer that keeps (groups, members), by block name, under the config's own keys.

        A removed block has no sizes, so its keys are absent. Those of a `recurrent` block are in `recurrent_config`.
        """

    def recurrent_config(self, config: Any, groups: int) -> dict[str, int]:
        """Return the sizes of a `recurrent` block with this number of kept groups, under the config's own keys."""
        return {}

    @abstractmethod
    def stock_config(self, config: Any, kept: Mapping[str, tuple[int, int]]) -> dict[str, Any] | None:
        """Return what changes in a dense config if every layer keeps (groups, members), by block name.

        None if no class of transformers can express that model.
        """


def _has_parameters(layer: nn.Module, path: str) -> bool:
    try:
        module = layer.get_submodule(path)
    except AttributeError:  # a layer of the other kind
        return False
    return any(True for _ in module.parameters())


def _linear(module: nn.Module, path: str) -> nn.Linear:
    linear = module.get_submodule(path)
    assert isinstance(linear, nn.Linear), f"{path} is a {type(linear).__name__}"
    return linear


def tensor_shape(module: nn.Module, name: str) -> torch.Size:
    """Return the shape of a weight or bias of a block, which may be stored in 8 bits."""
    path, _, key = name.rpartition(".")
    owner = module.get_submodule(path)
    if key == "weight" and isinstance(owner, nn.Linear):
        return torch.Size((owner.out_features, owner.in_features))
    return owner.get_parameter(key).shape
