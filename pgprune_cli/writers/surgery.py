"""What a decision does to a base model: the fate of every tensor, and the config of what is left. Touches no file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgprune_cli.arch import ArchSpec, Keep, LayerKeep, Outputs, gather_units
from pgprune_cli.errors import UserError
from pgprune_cli.writers import modeling_pruned


@dataclass(frozen=True)
class Cut:
    """What becomes of one tensor: its name in the result, and which units of its `axis` stay (None: all of it).

    repaired: the weights that stand in the place of the kept ones, where they were repaired.
    """

    name: str
    axis: int = 0
    mask: Tensor | None = None
    repaired: Tensor | None = None

    def apply(self, tensor: Tensor) -> Tensor:
        if self.repaired is not None:
            return self.repaired.to(tensor.dtype).contiguous()
        if self.mask is None:
            return tensor.contiguous()
        return gather_units(tensor, self.axis, self.mask.nonzero().squeeze(1), len(self.mask)).contiguous()

    def numel(self, shape: torch.Size) -> int:
        return shape.numel() if self.mask is None else shape.numel() // len(self.mask) * int(self.mask.sum())


class Surgery:
    """Where every tensor of the base goes, and what the config says of the result."""

    def __init__(self, spec: ArchSpec, keep: Keep, outputs: Outputs) -> None:
        self.spec = spec
        self.keep = keep
        self.outputs = outputs
        self.order = [i for i, layer in enumerate(keep) if layer.attention.any() or layer.ffn.any()]
        if not self.order:
            raise UserError("the decision keeps nothing of any layer; there is no model to write")

    def cut(self, name: str) -> Cut | None:
        """The fate of the base's tensor `name`; None where it is left out."""
        match = re.fullmatch(re.escape(self.spec.layers) + r"\.(\d+)\.(.+)", name)
        if match is None:
            return Cut(name)
        index, inner = int(match[1]), match[2]
        if index not in self.order:
            return None
        target = f"{self.spec.layers}.{self.order.index(index)}.{inner}"
        for family, block in self.spec.blocks():
            mask = self.keep[index].of(family)
            if inner.startswith((f"{block.module}.", f"{block.norm}.")) and not mask.any():
                return None
            for projection in block.projections:
                # The bias of a projection onto the residual stream belongs to no unit.
                biases = (f"{block.module}.{projection.name}.bias",) if projection.axis == 0 else ()
                if inner in (f"{block.module}.{projection.name}.weight", *biases):
                    output = self.outputs.get((index, family)) if projection == block.output else None
                    return Cut(target, projection.axis, mask, output.weight if output else None)
                if projection == block.output and inner == f"{block.module}.{projection.name}.bias":
                    output = self.outputs.get((index, family))
                    return Cut(target, repaired=output.bias if output else None)
        return Cut(target)

    def cuts(self, names: Iterable[str]) -> dict[str, Cut]:
        """`cut` for every tensor that is not left out."""
        return {name: cut for name in names if (cut := self.cut(name)) is not None}

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
        if all(size == sizes[0] for size in sizes) and "skip" not in sizes[0]:
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
        differing = [{k: v for k, v in size.items() if whole.get(k) != v} for size in sizes]
        return result | {
            "model_type": causal.config_class.model_type,
            "architectures": [causal.__name__],
            "auto_map": {auto: f"modeling_pruned.{cls.__name__}" for auto, cls in classes.items()},
            "per_layer_config": {str(index): size for index, size in enumerate(differing) if size},
        }

    @staticmethod
    def _sizes(layer: LayerKeep, dense: Any) -> dict[str, Any]:
        """A layer in the words of `per_layer_config`."""
        groups, channels = int(layer.attention.sum()), int(layer.ffn.sum())
        heads = groups * (dense.num_attention_heads // dense.num_key_value_heads)
        sizes: dict[str, Any] = {"num_attention_heads": heads, "num_key_value_heads": groups} if groups else {}
        sizes |= {"intermediate_size": channels} if channels else {}
        skip = [name for name, count in (("attention", groups), ("mlp", channels)) if not count]
        return sizes | ({"skip": skip} if skip else {})
