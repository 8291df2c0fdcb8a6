"""Gemma 2 and Gemma 3 (text): a norm before and a norm after each block, and logits that may be soft-capped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pgprune_cli.model.families.adapter import Block, GgufArchitectures
from pgprune_cli.model.families.llama import LlamaFamily


class GemmaFamily(LlamaFamily):
    """The adapter of the Gemmas. Their norms of queries and keys have one weight per channel of a head."""

    def norm_weight(self, norm: nn.Module) -> Tensor:
        return 1.0 + norm.get_parameter("weight")

    def finish_logits(self, config: Any, logits: Tensor) -> Tensor:
        cap = config.final_logit_softcapping
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def stock_config(self, config: Any, kept: Mapping[str, tuple[int, int]]) -> dict[str, Any] | None:
        sizes = self.layer_config(config, kept)
        # The configs refuse a number of query heads that does not divide the hidden size.
        return sizes if config.hidden_size % sizes["num_attention_heads"] == 0 else None


ATTENTION = Block(
    name="attention",
    module="self_attn",
    norms=("input_layernorm", "post_attention_layernorm"),
    projections=("q_proj", "k_proj", "v_proj", "o_proj"),
    config_name="attention",
    element_name="query heads",
    group_name="KV heads",
    post_norm="post_attention_layernorm",
)
FFN = Block(
    name="ffn",
    module="mlp",
    norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    projections=("gate_proj", "up_proj", "down_proj"),
    config_name="mlp",
    element_name="FFN channels",
    post_norm="post_feedforward_layernorm",
)

GEMMA = GemmaFamily(
    model_types=("gemma2", "gemma3_text"),
    layers="model.layers",
    embedding="model.embed_tokens",
    final_norm="model.norm",
    rotary="model.rotary_emb",
    head="lm_head",
    attention=ATTENTION,
    ffn=FFN,
    residual="pre_feedforward_layernorm",
    gguf={"gemma2": GgufArchitectures("gemma2", None), "gemma3_text": GgufArchitectures("gemma3", None)},
    bos_types=("gemma2", "gemma3_text"),
)
