"""The layout of a GGUF export: its architecture, its sizes, and where every tensor goes.

A model whose layers all have the same sizes becomes a stock file (`llama`, `qwen2`, `qwen3`), which every program that
reads GGUF knows. Any other becomes a `deci` file: llama.cpp's architecture whose layers each have their own numbers of
heads, KV heads and channels, and which otherwise is a Llama.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgprune_cli.errors import UserError
from pgprune_cli.export.shapes import ShapeRequirements
from pgprune_cli.export.surgery import Surgery, TensorEdit
from pgprune_cli.model.families.adapter import ModelFamily

REQUIREMENTS = ShapeRequirements(attention="first", ffn="every", pad_ffn=32)
"""llama.cpp takes the size of the whole cache from the first layer, so that layer needs a head. In a `deci` layer
without channels it drops the output of the attention. And the blocks of Q8_0 and similar types hold 32 weights."""

LIKE_LLAMA = ("llama", "deci")
"""Architectures that llama.cpp reads like a Llama. They rotate neighbouring pairs of a head's rows, while all others,
and transformers, rotate the two halves of a head. They also have a place for any output bias and for scaled RoPE."""

STATIC_ROPE = ("linear", "llama3", "yarn")
"""Kinds of RoPE scaling whose frequencies do not depend on the length of the text, so one vector holds them."""


@dataclass(frozen=True)
class Rope:
    """RoPE scaling. factors: what each frequency is divided by, float32 `(head_dim / 2,)`, or None; scale: of the
    rotated vectors."""

    factors: Tensor | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Layout:
    """Everything about the file except the values.

    family: of the base model; kept: how many (groups, members) every written layer has, by block name; hidden: size of
    the residual stream; context: longest text in tokens; names: the gguf library's map of tensor names.
    """

    architecture: str
    family: ModelFamily
    kept: tuple[dict[str, tuple[int, int]], ...]
    hidden: int
    head_dim: int
    context: int
    rope: Rope
    names: Any

    @classmethod
    def of(cls, config: Any, surgery: Surgery) -> Layout:
        """Return the layout for a dense model, of which `config` is the transformers config, after its surgery.

        Raises UserError if no GGUF architecture can hold the model.
        """
        architecture = _architecture(config.model_type, surgery)
        if config.hidden_act != "silu":
            raise UserError(
                f"--format gguf: the {architecture} architecture computes SiLU, but the base model uses "
                f"{config.hidden_act}. Export it with --format hf."
            )
        # llama.cpp has no sliding window for these architectures. Up to its length there is no difference.
        window = getattr(config, "sliding_window", None) or config.max_position_embeddings
        kept = tuple(surgery.shapes.sizes())
        return cls(
            architecture=architecture,
            family=surgery.family,
            kept=kept,
            hidden=config.hidden_size,
            head_dim=surgery.family.head_dim(config),
            context=min(config.max_position_embeddings, window),
            rope=_rope(config, surgery.family.head_dim(config), architecture),
            names=_tensor_names(architecture, len(kept)),
        )

    @property
    def kv_heads(self) -> list[int]:
        """KV heads of every written layer."""
        return [layer[self.family.attention.name][0] for layer in self.kept]

    @property
    def heads(self) -> list[int]:
        """Query heads of every written layer."""
        return [math.prod(layer[self.family.attention.name]) for layer in self.kept]

    @property
    def channels(self) -> list[int]:
        """FFN channels of every written layer."""
        return [math.prod(layer[self.family.ffn.name]) for layer in self.kept]

    def place(self, edit: TensorEdit) -> list[TensorEdit]:
        """Return the edit with its name and row order in the file, and the tensor that only GGUF has, if it is next."""
        match = re.fullmatch(re.escape(self.family.layers) + r"\.(\d+)\.(.+)", edit.name)
        make = edit.make
        if match is not None and self.architecture in LIKE_LLAMA:
            heads = self.family.rotated_heads(match[2], self.kept[int(match[1])])
            make = edit.make if heads is None else _make_in_pairs(edit.make, heads)
        placed = dataclasses.replace(edit, name=self._name(edit.name), make=make)
        factors = self.rope.factors
        if factors is None or edit.name != f"{self.family.final_norm}.weight":
            return [placed]
        # The factors come from the config, but every edit reads some tensor, and the final norm is a small one.
        return [placed, TensorEdit("rope_freqs.weight", factors.shape, factors.dtype, edit.source, lambda _: factors)]

    def _name(self, name: str) -> str:
        """Return GGUF's name for a tensor of transformers."""
        gguf_name: str | None = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise UserError(
                f"--format gguf: the {self.architecture} architecture cannot store the tensor {name}. "
                "Export the model with --format hf."
            )
        return gguf_name


def _architecture(model_type: str, surgery: Surgery) -> str:
    """Return llama.cpp's architecture. Raises UserError if it has none for these sizes and biases."""
    architectures = surgery.family.gguf[model_type]
    uniform = surgery.shapes.uniform
    if uniform and architectures.equal and (architectures.equal in LIKE_LLAMA or not surgery.new_biases):
        return architectures.equal
    if architectures.unequal is None:
        reason = "with the output biases that the repair fitted" if uniform else "whose layers have different sizes"
        raise UserError(
            f"--format gguf: llama.cpp has no architecture for a {model_type} model {reason}. "
            "Export it with --format hf."
        )
    return architectures.unequal


def interleave_halves(tensor: Tensor, heads: int) -> Tensor:
    """Return the rows of queries or keys (or of their bias) reordered for rotated pairs.

    transformers rotates the two halves of a head, so row i and row i + head_dim / 2 become neighbours.
    """
    pairs: Tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return pairs


def _make_in_pairs(make: Callable[[Tensor], Tensor], heads: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: interleave_halves(make(tensor), heads)


def _tensor_names(architecture: str, layers: int) -> Any:
    """Return the gguf library's map from transformers' names of tensors."""
    import gguf

    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(number, layers)


def _rope(config: Any, head_dim: int, architecture: str) -> Rope:
    """Return the RoPE scaling of a config. Raises UserError for one that GGUF cannot hold."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters
    kind = parameters["rope_type"]
    partial = parameters.get("partial_rotary_factor", 1.0) != 1.0
    if kind == "default" and not partial:
        return Rope()
    if kind not in STATIC_ROPE or architecture not in LIKE_LLAMA or partial:
        raise UserError(
            f"--format gguf: the {architecture} architecture cannot store rope_parameters of type {kind}"
            f"{' with a partial_rotary_factor' if partial else ''}. Export it with --format hf."
        )
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    unscaled = parameters["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return Rope((unscaled / frequencies.double()).float(), scale)
