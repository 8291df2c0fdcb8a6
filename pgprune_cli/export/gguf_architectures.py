"""llama.cpp's architectures: what the graph of each computes, as far as models differ in it.

From llama.cpp's source, `src/models/*.cpp`. Most architectures read one number of heads and of channels for all layers.
`deci` (a Llama) and `openelm` (a Qwen3 with tied embeddings) read a number for each layer, so unequal models become
one of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pgprune_cli.export.shapes import ShapeRequirements


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp.

    activation: of the FFN, as transformers calls it. per_layer: whether layers have their own numbers of heads, KV
    heads and channels. every_block: whether each layer needs a head and a channel. whole_heads: whether the heads must
    be as wide together as the residual stream, so that none can be removed. paired: whether rotary embeddings rotate
    neighbouring rows of a head, as opposed to its two halves. rope_vector: whether one vector can scale the
    frequencies. rope_by_length: whether two can, for short and for long contexts. partial_rope: whether the first rows
    of a head alone can be rotated. unrotated: every which layer is not rotated, 0 for none. output_biases: whether it
    has a place for any output bias. head: whether the output matrix is the embedding, another one, or either. fused:
    names of tensors that hold several projections. norm_shift: what is added to the weights of norms. windows: whether
    layers can have a sliding window. keys: config attributes, and the methods of a GGUFWriter that store them.
    """

    name: str
    activation: str = "silu"
    per_layer: bool = False
    every_block: bool = False
    whole_heads: bool = False
    paired: bool = False
    rope_vector: bool = False
    rope_by_length: bool = False
    partial_rope: bool = False
    unrotated: int = 0
    output_biases: bool = False
    head: Literal["tied", "own", "either"] = "either"
    fused: frozenset[str] = frozenset()
    norm_shift: float = 0.0
    windows: bool = False
    keys: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def requirements(self) -> ShapeRequirements:
        """The requirements on the shapes of any model.

        llama.cpp takes the size of the whole cache from the first layer, so that layer needs a head. In a `deci` layer
        without channels it drops the output of the attention. And the blocks of Q8_0 and similar types hold 32 weights.
        """
        return ShapeRequirements("every" if self.every_block else "first", "every", pad_ffn=32)


GEMMA = "gelu_pytorch_tanh"
SOFTCAP = {"final_logit_softcapping": "add_final_logit_softcapping"}
GRANITE = {
    "attention_multiplier": "add_attention_scale",
    "embedding_multiplier": "add_embedding_scale",
    "residual_multiplier": "add_residual_scale",
    "logits_scaling": "add_logit_scale",
}

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", paired=True, rope_vector=True, output_biases=True),
        Architecture("deci", per_layer=True, paired=True, rope_vector=True, rope_by_length=True, output_biases=True),
        Architecture("qwen2"),
        Architecture("qwen3"),
        Architecture("openelm", per_layer=True, every_block=True, head="tied", fused=frozenset({"attn_qkv"})),
        Architecture(
            "phi3",
            whole_heads=True,
            rope_by_length=True,
            partial_rope=True,
            fused=frozenset({"attn_qkv", "ffn_up"}),
        ),
        Architecture("granite", paired=True, rope_vector=True, keys=GRANITE),
        Architecture("mistral3", paired=True, rope_vector=True, output_biases=True),
        Architecture("smollm3", paired=True, unrotated=4),
        Architecture("gemma", activation=GEMMA, head="tied", norm_shift=1.0),
        Architecture(
            "gemma2",
            activation=GEMMA,
            head="tied",
            norm_shift=1.0,
            windows=True,
            keys=SOFTCAP | {"attn_logit_softcapping": "add_attn_logit_softcapping"},
        ),
        Architecture("gemma3", activation=GEMMA, norm_shift=1.0, windows=True, keys=SOFTCAP),
        Architecture("olmo2", whole_heads=True, head="own", windows=True),
    )
}
"""Those that pgprune can write, by name."""
