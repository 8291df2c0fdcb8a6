"""What pgprune has to know about a model family: where its blocks are, and which rows of which tensors make up a unit.

A decoder layer has two blocks. The elements of a block are a grid of groups × members (core/grid.py): the *attention*
block consists of KV heads with the query heads that share them, the *ffn* block of channels, or of experts with their
channels. A block that loses all its elements is removed as a whole, with its norms and its output bias.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from pgprune_cli.core.grid import Grid

PRUNED = "pruned_"
"""What the model type of an export with unequal layers begins with."""


def dense_type(model_type: str) -> str:
    """Return the model type of the dense model that a model of this type was pruned from, possibly itself."""
    return model_type.removeprefix(PRUNED)


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a tensor: `runs` runs of `width` rows, one run per element or one per group of a block."""

    runs: int
    width: int

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.runs * self.width


@dataclass(frozen=True)
class UnitTensor:
    """A weight or bias whose rows belong to the elements of a block.

    name: its name inside the block's module; axis: the axis along which the rows lie; parts: what they are, in order
    (a fused projection of queries, keys and values has three parts); stacked: True if the first axis holds the groups
    instead, so that `axis` holds the members of each group, and a part has one run per member.
    """

    name: str
    axis: int
    parts: tuple[Part, ...]
    stacked: bool = False

    @property
    def module(self) -> str:
        """Path of the module that holds the tensor, inside the block's module."""
        return self.name.rpartition(".")[0]

    @property
    def key(self) -> str:
        """Name of the tensor inside its own module: `weight` or `bias`."""
        return self.name.rpartition(".")[2]


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
        attention = (self.attention,) if self.recurrent is None else (self.attention, self.recurrent)
        return tuple(block for block in (*attention, self.ffn) if _has_parameters(layer, block.module))

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
        """Return the attributes (module, name, value) that a block has with so many groups and members.

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
        """Return the sizes of a `recurrent` block that keeps so many groups, under the config's own keys."""
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


class KeptElements:
    """The elements that a regular mask keeps, as indices of the runs of any tensor. Each index is made once.

    mask: `(elements,)` bool, on the host.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self._indices: dict[tuple[int, torch.device], Tensor] = {}

    def runs(self, runs: int, device: torch.device) -> Tensor:
        """Return the kept runs of a part with `runs` runs, ascending int64, on a device.

        From pinned memory, the host does not wait for the copy.
        """
        key = (runs, device)
        if key not in self._indices:
            index = self.mask.view(runs, -1).any(1).nonzero().squeeze(1)
            on_host = index.pin_memory() if device.type == "cuda" else index
            self._indices[key] = on_host.to(device, non_blocking=True)
        return self._indices[key]

    def members(self, groups: int) -> tuple[Tensor, Tensor]:
        """Return the kept groups `(g,)` and the kept members of each of them `(g, m)`, int64, on the host."""
        by_group = self.mask.view(groups, -1)
        kept = by_group.any(1).nonzero().squeeze(1)
        return kept, by_group[kept].nonzero()[:, 1].view(len(kept), -1)


def kept_shape(tensor: UnitTensor, shape: Sequence[int], mask: Tensor) -> torch.Size:
    """Return the shape of a unit tensor of `shape` with only the rows that a regular mask `(elements,)` keeps."""
    sizes = list(shape)
    if tensor.stacked:
        groups, members = KeptElements(mask).members(sizes[0])
        sizes[0], sizes[tensor.axis] = len(groups), sum(part.width * members.shape[1] for part in tensor.parts)
    else:
        sizes[tensor.axis] = sum(part.width * int(mask.view(part.runs, -1).any(1).sum()) for part in tensor.parts)
    return torch.Size(sizes)


def gather(values: Tensor, tensor: UnitTensor, kept: KeptElements) -> Tensor:
    """Return the kept rows of a weight or bias as a new tensor. values: the dense tensor, or anything with its rows."""
    if tensor.stacked:
        return _gather_stacked(values, tensor, kept)
    sizes = [part.rows for part in tensor.parts]
    picked = [
        gather_runs(rows, tensor.axis, kept.runs(part.runs, values.device), part.runs)
        for part, rows in zip(tensor.parts, values.split(sizes, tensor.axis), strict=True)
    ]
    return picked[0] if len(picked) == 1 else torch.cat(picked, tensor.axis)


def gather_runs(tensor: Tensor, axis: int, kept: Tensor, runs: int) -> Tensor:
    """Return the kept runs of a tensor whose `axis` holds `runs` runs of equal width.

    kept: indices of runs (int64, ascending) on the tensor's device. The result is a new tensor with
    `len(kept) · width` entries along `axis`.
    """
    width = tensor.shape[axis] // runs
    if width == 1:
        # Rows of the transposed matrix are contiguous: on a CPU that is three times as fast as picking columns.
        picked: Tensor = tensor.movedim(axis, 0).index_select(0, kept).movedim(0, axis)
        return picked
    unflattened = tensor.unflatten(axis, (runs, width))
    gathered: Tensor = unflattened.index_select(axis, kept).flatten(axis, axis + 1)
    return gathered


def _gather_stacked(values: Tensor, tensor: UnitTensor, kept: KeptElements) -> Tensor:
    """Gather from a tensor whose first axis holds the groups: the kept members of every kept group."""
    groups, members = kept.members(values.shape[0])
    starts = [0, *accumulate(part.rows for part in tensor.parts)]
    rows = [
        start + (members[:, :, None] * part.width + torch.arange(part.width)).flatten(1)
        for start, part in zip(starts, tensor.parts, strict=False)
    ]
    index = torch.cat(rows, 1).to(values.device)
    chosen = values.index_select(0, groups.to(values.device)).movedim(tensor.axis, 1)
    expanded = index.view(*index.shape, *(1,) * (chosen.dim() - 2)).expand(-1, -1, *chosen.shape[2:])
    return chosen.gather(1, expanded).movedim(1, tensor.axis).contiguous()
