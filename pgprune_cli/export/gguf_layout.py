"""The layout of a GGUF export: its architecture, its sizes and other hyperparameters.

A model whose layers all have the same sizes becomes a stock file (`llama`, `qwen2`, `gemma3`), which every program that
reads GGUF knows. Any other becomes a file of an architecture whose layers each have their own numbers of heads, KV
heads and channels, if llama.cpp has one that computes the same. What such an architecture lacks is folded into the
weights: Granite's multipliers, the fused projections of a Phi-3.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pgprune_cli.errors import UserError
from pgprune_cli.export.gguf_architectures import ARCHITECTURES, GRANITE, Architecture
from pgprune_cli.export.gguf_rope import InexpressibleError, Rope
from pgprune_cli.export.shapes import ShapeRequirements
from pgprune_cli.export.surgery import Surgery
from pgprune_cli.model.families.adapter import ModelFamily, dense_config, dense_type
from pgprune_cli.model.gguf_config import LARGEST


def requirements_of(family: ModelFamily, model_type: str) -> ShapeRequirements:
    """Return what the architectures of a model type require of the shapes. Raises UserError if it has none."""
    names = family.gguf.get(model_type)
    chosen = [ARCHITECTURES[name] for name in ((names.equal, names.unequal) if names else ()) if name in ARCHITECTURES]
    if not chosen:
        raise UserError(f"--format gguf: a {model_type} model cannot be written as GGUF. Export it with --format hf.")
    requirements = chosen[0].requirements
    for architecture in chosen[1:]:
        requirements = requirements.combined(architecture.requirements)
    return requirements


@dataclass(frozen=True)
class Layout:
    """Everything about the file except the values.

    family: of the base model; config: its transformers config; kept: how many (groups, members) every written layer
    has, by block name; windows: whether each written layer has a sliding window; names: the gguf library's map of
    tensor names; factors: what tensors are multiplied with, by GGUF name without layer and suffix.
    """

    architecture: Architecture
    family: ModelFamily
    config: Any
    kept: tuple[dict[str, tuple[int, int]], ...]
    windows: tuple[bool, ...]
    head_dim: int
    rope: Rope
    names: Any
    factors: Mapping[str, float]

    @classmethod
    def of(cls, config: Any, surgery: Surgery) -> Layout:
        """Return the layout for a dense model, of which `config` is the transformers config, after its surgery.

        Raises UserError if no GGUF architecture can hold the model.
        """
        names = surgery.family.gguf[dense_type(config.model_type)]
        candidates = [names.equal, names.unequal] if surgery.shapes.uniform else [names.unequal]
        reasons = []
        for name in candidates:
            try:
                if name in ARCHITECTURES:
                    return cls._of(ARCHITECTURES[name], config, surgery)
            except InexpressibleError as reason:
                reasons.append(f"the {name} architecture {reason}")
        sizes = "" if surgery.shapes.uniform else " whose layers have different sizes"
        kind = dense_type(config.model_type)
        why = "; ".join(reasons) or f"llama.cpp has no architecture for a model of type {kind}{sizes}"
        advice = "Export it with --format hf"
        if not surgery.shapes.uniform and cls._expresses(names.equal, config, surgery):
            advice += ", or search with budget.scope: per-layer"
        raise UserError(f"--format gguf: {why}. {advice}.")

    @classmethod
    def _expresses(cls, name: str | None, config: Any, surgery: Surgery) -> bool:
        """Return True if an architecture could hold the model, were its layers of the same sizes."""
        if name not in ARCHITECTURES:
            return False
        try:
            cls._of(ARCHITECTURES[name], config, surgery)
        except InexpressibleError:
            return False
        return True

    @classmethod
    def _of(cls, architecture: Architecture, config: Any, surgery: Surgery) -> Layout:
        family, head_dim = surgery.family, surgery.family.head_dim(config)
        kept, layers = tuple(surgery.shapes.sizes()), surgery.shapes.layers
        types = getattr(config, "layer_types", None) or ["sliding_attention"] * len(surgery.shapes.kept)
        window = bool(getattr(config, "sliding_window", None))
        layout = cls(
            architecture=architecture,
            family=family,
            config=config,
            kept=kept,
            windows=tuple(window and types[layer] == "sliding_attention" for layer in layers),
            head_dim=head_dim,
            rope=Rope.of(dense_config(config), head_dim, architecture),
            names=tensor_names(family.gguf[dense_type(config.model_type)].equal or architecture.name, len(kept)),
            factors={},
        )
        layout._check(surgery)
        return dataclasses.replace(layout, factors=layout._folded())

    def _check(self, surgery: Surgery) -> None:
        """Raise InexpressibleError if the architecture computes something else than the model."""
        architecture, config = self.architecture, self.config
        activation = getattr(config, "hidden_activation", None) or config.hidden_act
        if activation != architecture.activation:
            raise InexpressibleError(f"computes {architecture.activation}, but the base model uses {activation}")
        if surgery.new_biases and not architecture.output_biases:
            raise InexpressibleError("has no place for the output biases that the repair fitted")
        if architecture.whole_heads and any(heads * self.head_dim != config.hidden_size for heads in self.heads):
            raise InexpressibleError("cannot store a model without some of its heads")
        if architecture.head == "tied" and not config.tie_word_embeddings:
            raise InexpressibleError("cannot store an output matrix apart from the embedding")
        absent = [
            key for key in ("attn_logit_softcapping", "final_logit_softcapping") if getattr(config, key, 0) is None
        ]
        if absent and architecture.name == "gemma2":  # llama.cpp's gemma3 caps nothing unless the file says so
            raise InexpressibleError(f"always caps scores and logits, but the base model's {absent[0]} is null")
        rotated = getattr(config, "no_rope_layers", None) or [1] * len(surgery.shapes.kept)
        every = architecture.unrotated
        expected = [int(not every or (number + 1) % every != 0) for number in range(len(self.kept))]
        if [rotated[layer] for layer in surgery.shapes.layers] != expected:
            pattern = f"rotates all but every {every}th layer" if every else "rotates every layer"
            raise InexpressibleError(f"{pattern}, but the layers that are written differ")
        if getattr(config, "use_bidirectional_attention", False):
            raise InexpressibleError("computes causal attention, but the base model attends to later tokens too")

    @property
    def hidden(self) -> int:
        """Size of the residual stream."""
        size: int = self.config.hidden_size
        return size

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

    @property
    def context(self) -> int:
        """Longest text in tokens for which the file computes what the model does."""
        longest: int = self.config.max_position_embeddings
        if any(self.windows) and not self.architecture.windows:  # up to the window's length there is no difference
            longest = min(longest, self.config.sliding_window)
        if self._temperature and self.architecture.name != "mistral3":  # up to this length, queries are not scaled
            longest = min(longest, self.config.rope_parameters["original_max_position_embeddings"])
        return longest

    @property
    def _temperature(self) -> float | None:
        """How fast queries grow with their position."""
        beta: float | None = self.config.rope_parameters.get("llama_4_scaling_beta")
        return beta

    def add(self, writer: Any) -> None:
        """Add the sizes and other hyperparameters to the metadata of a GGUFWriter."""
        architecture, config = self.architecture, self.config
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(self.context)
        writer.add_embedding_length(self.hidden)
        writer.add_block_count(len(self.kept))
        per_layer = architecture.per_layer
        writer.add_head_count(self.heads if per_layer else self.heads[0])
        writer.add_head_count_kv(self.kv_heads if per_layer else self.kv_heads[0])
        writer.add_feed_forward_length(self.channels if per_layer else self.channels[0])
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        self.rope.add(writer)
        if architecture.windows and any(self.windows):
            writer.add_sliding_window(config.sliding_window)
            writer.add_sliding_window_pattern(list(self.windows))
        for attribute, method in architecture.keys.items():
            if (value := getattr(config, attribute, None)) is not None:
                getattr(writer, method)(value)
        if architecture.name == "mistral3" and self._temperature:
            writer.add_attn_temperature_scale(self._temperature)
            writer.add_rope_scaling_orig_ctx_len(config.rope_parameters["original_max_position_embeddings"])

    def _folded(self) -> dict[str, float]:
        """Return the factors that the architecture does not apply itself."""
        config = self.config
        factors: dict[str, float] = {}
        if hasattr(config, "residual_multiplier") and self.architecture.keys != GRANITE:
            factors |= {"token_embd": config.embedding_multiplier, "output": 1 / config.logits_scaling}
            factors |= {"attn_output": config.residual_multiplier, "ffn_down": config.residual_multiplier}
            factors["attn_q"] = config.attention_multiplier * math.sqrt(self.head_dim)
        if scale := getattr(config, "query_pre_attn_scalar", None):
            largest = len(self.kept) == LARGEST.get(self.architecture.name)
            llama_scale = self.hidden // self.heads[0] if largest else self.head_dim
            normed = self.architecture.name == "gemma3"
            factors["attn_q_norm" if normed else "attn_q"] = math.sqrt(llama_scale / scale)
        return {name: factor for name, factor in factors.items() if factor != 1.0}


def number_of(architecture: str) -> Any:
    """Return the gguf library's number of an architecture. Raises InexpressibleError if it is too old to know it."""
    import gguf

    for number, name in gguf.MODEL_ARCH_NAMES.items():
        if name == architecture:
            return number
    raise InexpressibleError("is unknown to this version of the gguf library (pip install -U gguf)")


def tensor_names(architecture: str, layers: int) -> Any:
    """Return the gguf library's map from transformers' names of tensors."""
    import gguf

    return gguf.get_tensor_name_map(number_of(architecture), layers)
