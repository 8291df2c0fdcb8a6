"""How a pruned model stands in a GGUF file: the architecture it claims, its sizes, and what becomes of every tensor.

Layers that are all alike make a stock file (`llama`, `qwen2`, `qwen3`), which every reader of GGUF knows. Other ones
make a `deci` file: llama.cpp's architecture whose layers have their own numbers of heads, KV heads and channels. It is
a Llama in all else, and reads some sizes wrongly, which is why there is padding here. None of it changes a result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pgprune_cli.arch import ArchSpec, LayerKeep, Outputs
from pgprune_cli.errors import UserError
from pgprune_cli.writers.surgery import Surgery

STOCK = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's architecture by the model type of the base, where all layers are alike."""

PAIRED = ("llama", "deci")
"""Architectures that rotate neighbouring pairs of a head's rows; transformers and the others rotate its halves."""

CHANNELS = 32
"""Channels of an FFN come in multiples of this, one block of Q8_0 and its like; what is missing is zeros."""

STATIC_ROPE = ("linear", "llama3", "yarn")
"""Kinds of rope scaling whose frequencies do not depend on the text's length: one vector holds them."""


@dataclass(frozen=True)
class Sizes:
    """A layer of the file."""

    groups: int
    channels: int


@dataclass(frozen=True)
class Entry:
    """A tensor of the file, made from one of the base: its name, its shape, and how the cut tensor becomes it."""

    name: str
    shape: torch.Size
    make: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layout:
    """The file, but for the values. `sizes`: of every layer; `queries`: query heads of a KV group.

    `rope`: by what each frequency is divided, `(head_dim / 2,)`, or None, and the scale of the rotation.
    """

    architecture: str
    spec: ArchSpec
    sizes: tuple[Sizes, ...]
    hidden: int
    head_dim: int
    queries: int
    context: int
    rope: tuple[Tensor | None, float]
    names: Any

    @classmethod
    def of(cls, spec: ArchSpec, config: Any, surgery: Surgery) -> Layout:
        """The layout for what `surgery` leaves of a dense model of transformers' `config`.

        Raises UserError for what GGUF's architectures have no place for.
        """
        sizes = tuple(_sizes(surgery.keep[index], first=place == 0) for place, index in enumerate(surgery.order))
        architecture = STOCK[config.model_type]
        if len(set(sizes)) > 1 or sizes[0].groups == 0:
            if config.model_type == "qwen3":
                raise UserError(
                    "GGUF has no architecture for a Qwen3 whose layers differ (none with norms of query and key); "
                    "export it with --format hf"
                )
            architecture = "deci"
        if config.hidden_act != "silu":
            raise UserError(f"GGUF's {architecture} architecture computes SiLU, and the base model {config.hidden_act}")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # llama.cpp knows no sliding window here; up to its length there is none in effect.
        window = getattr(config, "sliding_window", None) or config.max_position_embeddings
        return cls(
            architecture,
            spec,
            sizes,
            config.hidden_size,
            head_dim,
            config.num_attention_heads // config.num_key_value_heads,
            min(config.max_position_embeddings, window),
            _rope(config, head_dim, architecture),
            _names(architecture, len(sizes)),
        )

    def heads(self, layer: int) -> int:
        return self.sizes[layer].groups * self.queries

    def entry(self, name: str, shape: torch.Size) -> Entry:
        """What becomes of a tensor that the surgery left: `name` and `shape` are those in the pruned model."""
        match = re.fullmatch(re.escape(self.spec.layers) + r"\.(\d+)\.(.+)\.(weight|bias)", name)
        make: Callable[[Tensor], Tensor] = _as_it_is
        if match is not None:
            layer, module = int(match[1]), match[2]
            rotated = {"self_attn.q_proj": self.heads(layer), "self_attn.k_proj": self.sizes[layer].groups}
            channels = self.sizes[layer].channels
            if module in rotated and self.architecture in PAIRED:
                heads = rotated[module]
                make = lambda tensor: pairs(tensor, heads)  # noqa: E731
            elif module in ("mlp.gate_proj", "mlp.up_proj"):
                missing = channels - shape[0]
                shape = torch.Size((channels, *shape[1:]))
                make = lambda tensor: pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, missing))  # noqa: E731
            elif module == "mlp.down_proj" and len(shape) == 2:
                missing = channels - shape[1]
                shape = torch.Size((shape[0], channels))
                make = lambda tensor: pad(tensor, (0, missing))  # noqa: E731
        return Entry(self._name(name), shape, make)

    def additions(self, surgery: Surgery, found: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Tensors (float32) of the file that no tensor of the base, which has those of `found`, turns into."""
        added: dict[str, Tensor] = {}
        for place, index in enumerate(surgery.order):
            keep, layer = surgery.keep[index], f"{self.spec.layers}.{place}"
            if not keep.ffn.any():
                added |= self._zero_block(f"{layer}.mlp", ("gate_proj", "up_proj"), "down_proj", (CHANNELS, CHANNELS))
                added[f"{layer}.post_attention_layernorm.weight"] = torch.ones(self.hidden)
            if not keep.attention.any() and self.sizes[place].groups:
                rows = (self.queries * self.head_dim, self.head_dim, self.head_dim)
                added |= self._zero_block(f"{layer}.self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj", rows)
                added[f"{layer}.input_layernorm.weight"] = torch.ones(self.hidden)
            added |= _new_biases(self.spec, surgery.outputs, keep, index, place, found)
        named = {self._name(name): tensor for name, tensor in added.items()}
        factors, _ = self.rope
        return named if factors is None else named | {"rope_freqs.weight": factors}

    def _zero_block(self, block: str, inputs: tuple[str, ...], output: str, rows: tuple[int, ...]) -> dict[str, Tensor]:
        """The weights of a block that puts out zeros; `rows` of each input projection."""
        zeros = {f"{block}.{name}.weight": torch.zeros(n, self.hidden) for name, n in zip(inputs, rows, strict=True)}
        return zeros | {f"{block}.{output}.weight": torch.zeros(self.hidden, rows[0])}

    def _name(self, name: str) -> str:
        """GGUF's name for one of transformers'."""
        found: str | None = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(f"{name}: GGUF's {self.architecture} architecture has no place for this tensor")
        return found


def pairs(tensor: Tensor, heads: int) -> Tensor:
    """Rows of q or k (or of their bias) as transformers has them, its halves rotated, ordered for rotated pairs."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _sizes(keep: LayerKeep, first: bool) -> Sizes:
    """llama.cpp takes the whole model's size of the cache from the first layer, so that it needs a head.

    And a `deci` layer without channels forgets what its attention put out, so that there are always some.
    """
    groups, channels = int(keep.attention.sum()), int(keep.ffn.sum())
    return Sizes(max(groups, 1) if first else groups, max(-(-channels // CHANNELS), 1) * CHANNELS)


def _names(architecture: str, layers: int) -> Any:
    """gguf's map from transformers' names of tensors."""
    import gguf

    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(number, layers)


def _rope(config: Any, head_dim: int, architecture: str) -> tuple[Tensor | None, float]:
    """By what every frequency is divided, float32 `(head_dim / 2,)`, and the scale of the rotated vectors."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = config.rope_parameters
    kind = given["rope_type"]
    if kind == "default" and given.get("partial_rotary_factor", 1.0) == 1.0:
        return None, 1.0
    if kind not in STATIC_ROPE or architecture not in PAIRED or given.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"GGUF's {architecture} architecture has no place for the base model's rope_parameters, {kind}")
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    plain = given["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return (plain / frequencies.double()).float(), scale


def _new_biases(
    spec: ArchSpec, outputs: Outputs, keep: LayerKeep, index: int, place: int, found: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """Biases that a repair fitted where the base has none."""
    added = {}
    for family, block in spec.blocks():
        output, inner = outputs.get((index, family)), f"{block.output_path}.bias"
        bias = output.bias if output is not None and keep.of(family).any() else None
        if bias is not None and f"{spec.layers}.{index}.{inner}" not in found:
            added[f"{spec.layers}.{place}.{inner}"] = bias.float()
    return added
