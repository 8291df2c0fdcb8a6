"""OLMo 2 and OLMo 3: no norm before a block, but one after it, and norms of queries and keys over all heads together.

The norm of the queries divides every head by the root mean square of all heads. Without some of them, the others would
change, so heads are not removed one by one.
"""

from dataclasses import replace

from torch import nn

from pgprune_cli.model.families.adapter import Block, GgufArchitectures
from pgprune_cli.model.families.llama import ATTENTION, FFN, LlamaFamily
from pgprune_cli.model.unit_tensors import UnitTensor


class OlmoFamily(LlamaFamily):
    """The adapter of OLMo 2 and OLMo 3."""

    def refusal(self, model_type: str, block: str) -> str:
        if block != self.attention.name:
            return ""
        fact = f"q and k of {model_type} are normalised over all heads together"
        return f"{fact}, so removing a head would change the others."

    def unit_tensors(self, layer: nn.Module, block: Block) -> tuple[UnitTensor, ...]:
        tensors = super().unit_tensors(layer, block)
        if block != self.attention:
            return tensors
        parts = {tensor.name: tensor.parts for tensor in tensors}
        queries, keys, *_ = block.projections
        norms = {"q_norm": queries, "k_norm": keys}
        return *(UnitTensor(f"{norm}.weight", 0, parts[f"{name}.weight"]) for norm, name in norms.items()), *tensors


OLMO = OlmoFamily(
    model_types=("olmo2", "olmo3"),
    attention=replace(ATTENTION, norms=("post_attention_layernorm",), post_norm="post_attention_layernorm"),
    ffn=replace(FFN, norms=("post_feedforward_layernorm",), post_norm="post_feedforward_layernorm"),
    residual="mlp",
    gguf={model_type: GgufArchitectures("olmo2", None) for model_type in ("olmo2", "olmo3")},
)
