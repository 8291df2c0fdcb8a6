"""Models of text and images: a decoder, which is pruned, inside a wrapper with a vision tower, which is not.

The decoder alone is loaded, searched and evaluated, as the causal language model of its own family. Exports to a
transformers directory have everything else as it was.
"""

from __future__ import annotations

import copy
from typing import Any

from pgprune_cli.model.families.adapter import dense_type

WRAPPERS = ("mistral3", "gemma3", "qwen3_5")
"""The model types of wrappers."""

DECODERS = ("qwen3_5_text",)
"""The model types of decoders alone whose files may have the names of the wrapper's."""

SECTION = "text_config"
"""The key of the decoder's config inside the wrapper's."""

PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("language_model.", "model."),
    ("lm_head.", "lm_head."),
)
"""What names of the decoder's tensors begin with in the wrapper's files, and in the causal model."""


def is_wrapper(model_type: str | None) -> bool:
    """Return whether a model type is that of a wrapper, or of an exported wrapper."""
    return model_type is not None and dense_type(model_type) in WRAPPERS


def has_wrapped_names(model_type: str) -> bool:
    """Return whether transformers reads the names of a wrapper's tensors in files of this decoder alone."""
    return dense_type(model_type) in DECODERS


def decoder_config(config: Any) -> Any:
    """Return the config of the decoder: a wrapper's section, completed by what the wrapper decides, or `config`."""
    if not is_wrapper(config.model_type):
        return config
    section = copy.copy(config.get_text_config())
    section.tie_word_embeddings = config.tie_word_embeddings
    section.dtype = section.dtype or config.dtype
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        section.quantization_config = quantization
    return section


def decoder_prefixes(name: str) -> tuple[str, str] | None:
    """Return the entry of PREFIXES that a tensor's name in a wrapper's files begins with, None if it has none."""
    return next((pair for pair in PREFIXES if name.startswith(pair[0])), None)


def decoder_name(name: str) -> str:
    """Return the name in the causal model of a tensor in a wrapper's files. A tensor outside the decoder keeps it."""
    prefixes = decoder_prefixes(name)
    return name if prefixes is None else prefixes[1] + name.removeprefix(prefixes[0])
