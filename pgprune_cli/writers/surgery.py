"""What a decision does to a base model: the fate of every tensor, and the config of what is left. Touches no file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgprune_cli.arch import ArchSpec, Block, Keep, LayerKeep, Outputs, gather_units
from pgprune_cli.errors import UserError
from pgprune_cli.writers import modeling_pruned

WORDS = {"attention": "attention", "ffn": "mlp"}
"""What transformers calls a block."""


@dataclass(frozen=True)
class Cut:
    """One tensor of the result: its name, its shape, the tensor of the base that it is made of, and how."""

    name: str
    shape: torch.Size
    source: str
    make: Callable[[Tensor], Tensor]

    def apply(self, tensor: Tensor) -> Tensor:
        """The result, in the dtype of the base's tensor `source`, which is given."""
        return self.make(tensor).to(tensor.dtype).contiguous()


class Surgery:
    """Where every tensor of the base goes, and what the config says of the result.

    `shapes`: of the base's tensors, by name. Raises UserError where nothing is kept.
    """

    def __init__(self, spec: ArchSpec, keep: Keep, outputs: Outputs, shapes: Mapping[str, torch.Size]) -> None:
        self.spec = spec
        self.keep = keep
        self.outputs = outputs
        self.shapes = shapes
        self.order = [i for i, layer in enumerate(keep) if layer.attention.any() or layer.ffn.any()]
        if not self.order:
            raise UserError("the decision keeps nothing of any layer; there is no model to write")
        paths = {name: block.output_path for name, block in spec.blocks()}
        self.new_biases = {
            name
            for (index, name), output in outputs.items()
            if output.bias is not None and f"{spec.layers}.{index}.{paths[name]}.bias" not in shapes
        }
        """The blocks whose output has a bias in the result and not in the base: in all layers, zeros where unfitted."""

    def cuts(self) -> list[Cut]:
        """Every tensor of the result, in the order of the base."""
        return [cut for name in self.shapes for cut in self._cuts_of(name)]

    def _cuts_of(self, name: str) -> Iterator[Cut]:
        """What is made of the base's tensor `name`: nothing where it is left out."""
        match = re.fullmatch(re.escape(self.spec.layers) + r"\.(\d+)\.(.+)", name)
        if match is None:
            yield Cut(name, self.shapes[name], name, _whole)
        elif (index := int(match[1])) in self.order:
            for family, block in self.spec.blocks():
                inner = match[2]
                if inner.startswith((f"{block.module}.", f"{block.norm}.")) and self.keep[index].of(family).any():
                    yield from self._cuts_of_block(name, index, inner, family, block)

    def _cuts_of_block(self, name: str, index: int, inner: str, family: str, block: Block) -> Iterator[Cut]:
        """What is made of the tensor `name`, which layer `index` calls `inner`, of one of its blocks that stay."""
        layer, shape = f"{self.spec.layers}.{self.order.index(index)}", self.shapes[name]
        mask, output = self.keep[index].of(family), self.outputs.get((index, family))
        bias = output.bias if output else None
        module, _, kind = inner.rpartition(".")
        if module == block.output_path and kind == "bias":  # onto the residual stream: it belongs to no unit
            yield Cut(f"{layer}.{inner}", shape, name, _whole if bias is None else _given(bias))
        elif module == block.output_path:
            columns = torch.Size((shape[0], _part(shape[1], mask)))
            yield Cut(f"{layer}.{inner}", columns, name, _given(output.weight) if output else _units(1, mask))
            if family in self.new_biases:
                yield Cut(f"{layer}.{module}.bias", shape[:1], name, _no_bias if bias is None else _given(bias))
        elif module in (f"{block.module}.{projection.name}" for projection in block.projections):
            rows = torch.Size((_part(shape[0], mask), *shape[1:]))
            yield Cut(f"{layer}.{inner}", rows, name, _units(0, mask))
        else:  # a norm, which all units share
            yield Cut(f"{layer}.{inner}", shape, name, _whole)

    def config(self, given: Mapping[str, Any], dense: Any) -> dict[str, Any]:
        """The result's config.json: a stock model's where all layers are alike, else with `per_layer_config`.

        `given` is the base's config.json, which may leave out defaults; `dense` is what transformers reads it as.
        """
        head_dim = getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads
        result = dict(given) | {"num_hidden_layers": len(self.order), "head_dim": head_dim}
        result.pop("auto_map", None)
        kept = [self.keep[index] for index in self.order]
        if types := getattr(dense, "layer_types", None):
            # A layer without heads stands in the cache for the first that has some: see modeling_pruned.py.
            first = next((i for i in self.order if self.keep[i].attention.any()), 0)
            result["layer_types"] = [types[i if self.keep[i].attention.any() else first] for i in self.order]
        sizes = [self._sizes(layer, dense) for layer in kept]
        if all(size == sizes[0] for size in sizes) and "skip" not in sizes[0] and not self.new_biases:
            heads = sizes[0]["num_attention_heads"]
            if dense.model_type != "llama" or dense.hidden_size % heads == 0:
                return result | sizes[0]
            if not dense.attention_bias and not dense.mlp_bias:
                # Llama's config refuses this number of heads; Mistral's is the same model and does not ask.
                mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
                return result | sizes[0] | mistral | {"max_position_embeddings": dense.max_position_embeddings}
        causal: Any = modeling_pruned.FAMILIES[dense.model_type]
        classes = {
            "AutoConfig": causal.config_class,
            "AutoModel": causal.decoder_class,
            "AutoModelForCausalLM": causal,
        }
        whole = self._sizes(LayerKeep(*(torch.ones_like(m) for m in (kept[0].attention, kept[0].ffn))), dense)
        biases = [word for name, word in WORDS.items() if name in self.new_biases]
        differing = [{k: v for k, v in size.items() if whole.get(k) != v} for size in sizes]
        return result | {
            "model_type": causal.config_class.model_type,
            "architectures": [causal.__name__],
            "auto_map": {auto: f"modeling_pruned.{cls.__name__}" for auto, cls in classes.items()},
            "per_layer_config": {str(index): size for index, size in enumerate(differing) if size},
            **({"output_biases": biases} if biases else {}),
        }

    @staticmethod
    def _sizes(layer: LayerKeep, dense: Any) -> dict[str, Any]:
        """A layer in the words of `per_layer_config`."""
        groups, channels = int(layer.attention.sum()), int(layer.ffn.sum())
        heads = groups * (dense.num_attention_heads // dense.num_key_value_heads)
        sizes: dict[str, Any] = {"num_attention_heads": heads, "num_key_value_heads": groups} if groups else {}
        sizes |= {"intermediate_size": channels} if channels else {}
        skip = [word for name, word in WORDS.items() if not layer.of(name).any()]
        return sizes | ({"skip": skip} if skip else {})


def _part(size: int, mask: Tensor) -> int:
    """What is left of an axis of `size` along which the units of `mask` lie."""
    return size // len(mask) * int(mask.sum())


def _whole(tensor: Tensor) -> Tensor:
    return tensor


def _no_bias(weight: Tensor) -> Tensor:
    return weight.new_zeros(weight.shape[0])


def _given(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: value


def _units(axis: int, mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda tensor: gather_units(tensor, axis, mask.nonzero().squeeze(1), len(mask))
