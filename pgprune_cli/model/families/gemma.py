"""Gemma, Gemma 2 and Gemma 3 (text). Since Gemma 2, blocks also have a norm after them, and logits can be capped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from pgprune_cli.model.families.adapter import GgufArchitectures
from pgprune_cli.model.families.llama import ATTENTION, FFN, LlamaFamily


class GemmaFamily(LlamaFamily):
    """The adapter of Gemma, a Llama with other norms and scaled embeddings."""

    def norm_weight(self, norm: nn.Module) -> Tensor:
        return 1.0 + norm.get_parameter("weight")


class Gemma2Family(GemmaFamily):
    """The adapter of Gemma 2 and Gemma 3. The norms of Gemma 3's queries and keys are shared by all heads."""

    def finish_logits(self, config: Any, logits: Tensor) -> Tensor:
        cap = config.final_logit_softcapping
        if cap is None:
            return logits
        capped = logits.div_(cap).tanh_()
        return capped * cap if capped.requires_grad else capped.mul_(cap)  # the gradient needs the tanh

    def logit_slopes(self, config: Any, logits: Tensor) -> Tensor | None:
        cap = config.final_logit_softcapping
        return None if cap is None else 1.0 - (logits / cap).square()

    def stock_config(self, config: Any, kept: Mapping[str, tuple[int, int]]) -> dict[str, Any] | None:
        sizes = self.layer_config(config, kept)
        # The configs refuse a number of query heads that does not divide the hidden size.
        return sizes if config.hidden_size % sizes["num_attention_heads"] == 0 else None


GEMMA = GemmaFamily(model_types=("gemma",), gguf={"gemma": GgufArchitectures("gemma", None)}, bos_types=("gemma",))
GEMMA2 = Gemma2Family(
    model_types=("gemma2", "gemma3_text"),
    attention=replace(
        ATTENTION, norms=("input_layernorm", "post_attention_layernorm"), post_norm="post_attention_layernorm"
    ),
    ffn=replace(
        FFN, norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"), post_norm="post_feedforward_layernorm"
    ),
    residual="pre_feedforward_layernorm",
    gguf={"gemma2": GgufArchitectures("gemma2", None), "gemma3_text": GgufArchitectures("gemma3", None)},
    bos_types=("gemma2", "gemma3_text"),
)
