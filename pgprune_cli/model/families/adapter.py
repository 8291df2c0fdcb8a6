"""What pgprune has to know about a model family: where its blocks are, and which rows and columns make up a unit.

A decoder layer has two blocks. A unit of the *attention* block is a KV head with the query heads that share it: rows of
q, k and v (and of their biases) and the matching columns of the output projection. A unit of the *ffn* block is one
channel: a row of gate and up and the matching column of down. A block that loses all its units is removed as a whole,
with its norm and its output bias.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Projection:
    """A linear layer: its name inside its block, and the axis of its weight `(out, in)` along which the units lie."""

    name: str
    axis: int


@dataclass(frozen=True)
class Block:
    """A block of a decoder layer.

    name: `attention` or `ffn`; module: its path inside the layer; norm: the path of the norm before it; projections:
    its linear layers, the one that writes to the residual stream last; config_name: what `per_layer_config` of an
    export calls it; unit_name: what people call its units, in the plural.
    """

    name: str
    module: str
    norm: str
    projections: tuple[Projection, ...]
    config_name: str
    unit_name: str

    @property
    def output(self) -> Projection:
        """The projection that writes to the residual stream."""
        return self.projections[-1]

    @property
    def output_path(self) -> str:
        """Path of the output projection inside its layer."""
        return f"{self.module}.{self.output.name}"

    def linears(self, layer: nn.Module) -> list[nn.Linear]:
        """Return the linear layers of this block in a decoder layer, in the order of `projections`."""
        module = layer.get_submodule(self.module)
        return [_linear(module, projection.name) for projection in self.projections]

    def output_linear(self, layer: nn.Module) -> nn.Linear:
        """Return the output projection of this block in a decoder layer."""
        return _linear(layer, self.output_path)

    def tensor_prefixes(self) -> tuple[str, str]:
        """Return what the names of this block's tensors begin with, inside their layer."""
        return f"{self.module}.", f"{self.norm}."


@dataclass(frozen=True)
class GgufArchitectures:
    """llama.cpp's architectures for one model type.

    equal: for a model whose layers all have the same sizes; unequal: for any other, None if llama.cpp has none.
    """

    equal: str
    unequal: str | None


@dataclass(frozen=True)
class ModelFamily(ABC):
    """An adapter: one way of laying out a decoder.

    model_types: the transformers configs laid out so; the paths of modules of the causal model: layers (a list),
    embedding, final_norm, rotary, head; attention, ffn: the blocks of a layer; gguf: by model type, what GGUF exports
    are called.
    """

    model_types: tuple[str, ...]
    layers: str
    embedding: str
    final_norm: str
    rotary: str
    head: str
    attention: Block
    ffn: Block
    gguf: Mapping[str, GgufArchitectures] = field(hash=False)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of a layer, in the order in which they run."""
        return (self.attention, self.ffn)

    def block(self, name: str) -> Block:
        """Return the block of that name. Raises KeyError."""
        return {block.name: block for block in self.blocks}[name]

    @property
    def residual_norm(self) -> str:
        """Path, inside a layer, of the norm whose input is the residual stream between the two blocks."""
        return self.blocks[-1].norm

    @property
    def head_weight(self) -> str:
        """Name of the tensor that files of a model with tied embeddings may lack."""
        return f"{self.head}.weight"

    @property
    def embedding_weight(self) -> str:
        return f"{self.embedding}.weight"

    def linears(self, layer: nn.Module) -> Iterator[tuple[Block, Projection, nn.Linear]]:
        """Yield every prunable linear layer of a decoder layer with its block and its place in it."""
        for block in self.blocks:
            for projection, linear in zip(block.projections, block.linears(layer), strict=True):
                yield block, projection, linear

    @abstractmethod
    def units(self, layer: nn.Module) -> dict[str, int]:
        """Return how many units each block of a dense layer has, by block name."""

    @abstractmethod
    def placeholder(self, block: Block) -> nn.Module:
        """Return a module that runs in place of a removed block: it adds nothing to the residual stream."""

    @abstractmethod
    def attention_flops(self, layer: nn.Module, visible_keys: int, context: int) -> dict[str, int]:
        """Return the FLOPs per token and unit, by block name, that are not products with weights.

        visible_keys: summed over all queries of a sequence of `context` tokens.
        """

    @abstractmethod
    def cache_bytes(self, layer: nn.Module, tokens: int) -> dict[str, int]:
        """Return the bytes of the KV cache per unit, by block name, for `tokens` cached tokens."""

    @abstractmethod
    def attention_window(self, config: Any, layer: nn.Module, context: int) -> int:
        """Return how many keys the last of `context` tokens sees in this layer."""

    @abstractmethod
    def activation_width(self, block: Block, hidden: int, inner: tuple[int, ...], inputs: int) -> int:
        """Return how many activations per token exist at the same time while a dense block runs, at most.

        inner: the output widths of the inner projections; inputs: the input width of the output projection.
        """

    @abstractmethod
    def rotated_heads(self, tensor: str, units: Mapping[str, int], queries_per_kv_head: int) -> int | None:
        """Return how many heads the rows of a tensor hold if rotary embeddings rotate them, else None.

        tensor: its name inside its layer; units: how many units the layer has, by block name.
        """

    @abstractmethod
    def head_dim(self, config: Any) -> int:
        """Return how many channels a head has."""

    @abstractmethod
    def layer_config(self, config: Any, units: Mapping[str, int]) -> dict[str, int]:
        """Return the sizes of a layer that keeps `units`, by block name, under the config's own keys.

        A block without units has no sizes, so its keys are absent.
        """

    @abstractmethod
    def stock_config(self, config: Any, units: Mapping[str, int]) -> dict[str, Any] | None:
        """Return what changes in a dense config if every layer keeps `units`, by block name.

        None if no class of transformers can express that model.
        """


def _linear(module: nn.Module, path: str) -> nn.Linear:
    linear = module.get_submodule(path)
    assert isinstance(linear, nn.Linear), f"{path} is a {type(linear).__name__}"
    return linear


def gather_units(tensor: Tensor, axis: int, kept: Tensor, units: int) -> Tensor:
    """Return the kept units of a weight or bias whose `axis` holds `units` runs of equal width, one per unit.

    kept: unit indices (int64, ascending) on the tensor's device. The result is a new tensor with
    `len(kept) · width` entries along `axis`.
    """
    width = tensor.shape[axis] // units
    if width == 1:
        # Rows of the transposed matrix are contiguous: on a CPU that is three times as fast as picking columns.
        picked: Tensor = tensor.movedim(axis, 0).index_select(0, kept).movedim(0, axis)
        return picked
    runs = tensor.unflatten(axis, (units, width))
    gathered: Tensor = runs.index_select(axis, kept).flatten(axis, axis + 1)
    return gathered
