"""How a pruned model stands in a GGUF file: the architecture it claims, its sizes, and what becomes of every tensor.

Layers that are all alike make a stock file (`llama`, `qwen2`, `qwen3`), which every reader of GGUF knows. Other ones
make a `deci` file: llama.cpp's architecture whose layers have their own numbers of heads, KV heads and channels. It is
a Llama in all else.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgprune_cli.errors import UserError
from pgprune_cli.export.shapes import Needs
from pgprune_cli.export.surgery import Cut, Surgery
from pgprune_cli.model.families.adapter import ModelFamily

NEEDS = Needs(attention="first", ffn="every", ffn_multiple=32)
"""llama.cpp takes the whole model's size of the cache from the first layer, so that it needs a head. A `deci` layer
without channels forgets what its attention put out. And a block of Q8_0 and its like is 32 weights."""

STOCK = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's architecture by the model type of the base, where all layers are alike."""

LIKE_LLAMA = ("llama", "deci")
"""Architectures that llama.cpp reads as it reads a Llama: they rotate neighbouring pairs of a head's rows, where the
others and transformers rotate its halves, and have a place for any output bias and for a scaled RoPE's frequencies."""

STATIC_ROPE = ("linear", "llama3", "yarn")
"""Kinds of rope scaling whose frequencies do not depend on the text's length: one vector holds them."""


@dataclass(frozen=True)
class Layout:
    """The file, but for the values.

    family: of the base; sizes: KV heads and channels of every layer; queries: query heads of a
    KV head; rope: by what each frequency is divided, `(head_dim / 2,)`, or None, and the scale of the rotation.
    """

    architecture: str
    family: ModelFamily
    sizes: tuple[tuple[int, int], ...]
    hidden: int
    head_dim: int
    queries: int
    context: int
    rope: tuple[Tensor | None, float]
    names: Any

    @classmethod
    def of(cls, config: Any, surgery: Surgery) -> Layout:
        """The layout for what `surgery` leaves of a dense model of transformers' `config`.

        Raises UserError for what GGUF's architectures have no place for.
        """
        architecture = _architecture(config.model_type, surgery)
        if config.hidden_act != "silu":
            raise UserError(f"GGUF's {architecture} architecture computes SiLU, and the base model {config.hidden_act}")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # llama.cpp knows no sliding window here; up to its length there is none in effect.
        window = getattr(config, "sliding_window", None) or config.max_position_embeddings
        sizes = tuple(surgery.form.sizes())
        return cls(
            architecture,
            surgery.family,
            sizes,
            config.hidden_size,
            head_dim,
            config.num_attention_heads // config.num_key_value_heads,
            min(config.max_position_embeddings, window),
            _rope(config, head_dim, architecture),
            _names(architecture, len(sizes)),
        )

    @property
    def groups(self) -> list[int]:
        return [groups for groups, _ in self.sizes]

    @property
    def heads(self) -> list[int]:
        return [groups * self.queries for groups in self.groups]

    @property
    def channels(self) -> list[int]:
        return [channels for _, channels in self.sizes]

    def place(self, cut: Cut) -> list[Cut]:
        """A tensor under its name in the file, rows of q and k in its order; and what the file has beside it."""
        match = re.fullmatch(re.escape(self.family.layers) + r"\.(\d+)\.(.+)", cut.name)
        make = cut.make
        if match is not None and self.architecture in LIKE_LLAMA:
            heads = self.family.rotated_heads(match[2], self.sizes[int(match[1])], self.queries)
            make = cut.make if heads is None else _in_pairs(cut.make, heads)
        placed = dataclasses.replace(cut, name=self._name(cut.name), make=make)
        factors, _ = self.rope
        if factors is None or placed.name != "output_norm.weight":
            return [placed]
        # Of the config, not of a tensor; but every cut is of one, and the last norm is small.
        return [placed, Cut("rope_freqs.weight", factors.shape, factors.dtype, cut.source, lambda _: factors)]

    def _name(self, name: str) -> str:
        """GGUF's name for one of transformers'."""
        found: str | None = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(f"{name}: GGUF's {self.architecture} architecture has no place for this tensor")
        return found


def _architecture(model_type: str, surgery: Surgery) -> str:
    stock = STOCK[model_type]
    if surgery.form.uniform and (stock in LIKE_LLAMA or not surgery.new_biases):
        return stock
    if model_type == "qwen3":
        what = "with a bias that a repair fitted" if surgery.form.uniform else "whose layers differ"
        raise UserError(
            f"GGUF has no architecture for a Qwen3 {what} (none that norms query and key); export it with --format hf"
        )
    return "deci"


def pairs(tensor: Tensor, heads: int) -> Tensor:
    """Rows of q or k (or of their bias) as transformers has them, its halves rotated, ordered for rotated pairs."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _in_pairs(make: Callable[[Tensor], Tensor], heads: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: pairs(make(tensor), heads)


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
    if kind not in STATIC_ROPE or architecture not in LIKE_LLAMA or given.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"GGUF's {architecture} architecture has no place for the base model's rope_parameters, {kind}")
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    plain = given["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return (plain / frequencies.double()).float(), scale
