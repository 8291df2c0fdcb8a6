"""Decoders that pgprune made: Llama, Mistral, Qwen2 and Qwen3 whose layers differ in heads and channels.

This file lies in every exported model directory that needs it; `trust_remote_code=True` makes transformers run it.
Where pgprune is installed, `import pgprune_cli.serving.modeling_pruned` does instead. It needs no pgprune itself.

The sizes stand in `per_layer_config` as transformers (5.14 and later) defines it: by layer index, the values in which a
layer differs from the global, dense ones; `"skip": ["attention"]` or `["mlp"]` for a layer that lost that block.
`output_biases` lists which of these blocks have a bias on their output in every layer, where the base's have none.
"""

import copy
import dataclasses

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3


class PrunedConfig:
    """What the configs below add to their base."""

    def validate_architecture(self) -> None:
        """Any number of heads will do: head_dim is given, so the hidden size need not be a multiple of them."""

    def of_layer(self, overrides: dict):
        """This config as one layer sees it: plain values, and `skip`, the blocks the layer lacks."""
        layer = copy.copy(self)
        layer.per_layer_config = None
        for name, value in ({"skip": []} | overrides).items():
            setattr(layer, name, value)
        return layer

    def of_layers(self) -> list:
        """`of_layer` for every layer in order."""
        # to_dict, because the attribute itself is a dict in older transformers and a view in newer.
        overrides = {int(index): given for index, given in (self.to_dict().get("per_layer_config") or {}).items()}
        return [self.of_layer(overrides.get(index, {})) for index in range(self.num_hidden_layers)]


class NoHeads(nn.Module):
    """In the place of attention that lost all its heads: adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor, **_) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class NoChannels(nn.Module):
    """In the place of a feed-forward block that lost all its channels."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class PrunedModel:
    """The base's model, with every decoder layer built from its own config."""

    layer_class: type[nn.Module]

    def __init__(self, config) -> None:
        theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
        # transformers 4 does not know rope_parameters: it would go on with its default, and be wrong.
        if theta is not None and theta != getattr(config, "rope_theta", theta):
            raise ValueError(f"{config.model_type}: this model's rope_parameters need transformers 5 or later")
        shell = config.of_layer({"num_hidden_layers": 0})  # the base builds all but the layers
        super().__init__(shell)
        self.config, config._attn_implementation = config, shell._attn_implementation
        layers = config.of_layers()
        self.layers = nn.ModuleList(self.build(layer, index) for index, layer in enumerate(layers))
        # The cache takes its length from slot 0. So the first layer that has heads writes there, not at its own index,
        # and the slots of layers without heads stay empty.
        first = next((layer for layer in self.layers if not isinstance(layer.self_attn, NoHeads)), None)
        if first is not None:
            first.self_attn.layer_idx = 0
        self.post_init()

    def build(self, config, index: int) -> nn.Module:
        layer = self.layer_class(config, index)
        # Only the sizes are the layer's own: what may change later (set_attn_implementation) is read from the whole's.
        layer.self_attn.config = layer.mlp.config = self.config
        for name, block, output in (("attention", layer.self_attn, "o_proj"), ("mlp", layer.mlp, "down_proj")):
            if name in (getattr(config, "output_biases", None) or ()):
                linear = getattr(block, output)
                setattr(block, output, nn.Linear(linear.in_features, linear.out_features))
        if "attention" in config.skip:
            layer.input_layernorm, layer.self_attn = nn.Identity(), NoHeads()
        if "mlp" in config.skip:
            layer.post_attention_layernorm, layer.mlp = nn.Identity(), NoChannels()
        return layer


class PrunedForCausalLM:
    """The base's causal model, around the pruned decoder."""

    decoder_class: type[PreTrainedModel]

    def __init__(self, config) -> None:
        PreTrainedModel.__init__(self, config)  # not the base's own, which builds dense layers
        self.model = self.decoder_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def config_class(cls):
    """Newer transformers have configs as strict dataclasses, which gather their validators here."""
    return strict(cls) if dataclasses.is_dataclass(cls) else cls


@config_class
class PrunedLlamaConfig(PrunedConfig, llama.LlamaConfig):
    model_type = "pruned_llama"


class PrunedLlamaModel(PrunedModel, llama.LlamaModel):
    config_class = PrunedLlamaConfig
    layer_class = llama.LlamaDecoderLayer


class PrunedLlamaForCausalLM(PrunedForCausalLM, llama.LlamaForCausalLM):
    config_class = PrunedLlamaConfig
    decoder_class = PrunedLlamaModel


@config_class
class PrunedMistralConfig(PrunedConfig, mistral.MistralConfig):
    model_type = "pruned_mistral"


class PrunedMistralModel(PrunedModel, mistral.MistralModel):
    config_class = PrunedMistralConfig
    layer_class = mistral.MistralDecoderLayer


class PrunedMistralForCausalLM(PrunedForCausalLM, mistral.MistralForCausalLM):
    config_class = PrunedMistralConfig
    decoder_class = PrunedMistralModel


@config_class
class PrunedQwen2Config(PrunedConfig, qwen2.Qwen2Config):
    model_type = "pruned_qwen2"


class PrunedQwen2Model(PrunedModel, qwen2.Qwen2Model):
    config_class = PrunedQwen2Config
    layer_class = qwen2.Qwen2DecoderLayer


class PrunedQwen2ForCausalLM(PrunedForCausalLM, qwen2.Qwen2ForCausalLM):
    config_class = PrunedQwen2Config
    decoder_class = PrunedQwen2Model


@config_class
class PrunedQwen3Config(PrunedConfig, qwen3.Qwen3Config):
    model_type = "pruned_qwen3"


class PrunedQwen3Model(PrunedModel, qwen3.Qwen3Model):
    config_class = PrunedQwen3Config
    layer_class = qwen3.Qwen3DecoderLayer


class PrunedQwen3ForCausalLM(PrunedForCausalLM, qwen3.Qwen3ForCausalLM):
    config_class = PrunedQwen3Config
    decoder_class = PrunedQwen3Model


FAMILIES = {
    "llama": PrunedLlamaForCausalLM,
    "mistral": PrunedMistralForCausalLM,
    "qwen2": PrunedQwen2ForCausalLM,
    "qwen3": PrunedQwen3ForCausalLM,
}
"""The causal model by the model type of its base."""

for causal in FAMILIES.values():
    AutoConfig.register(causal.config_class.model_type, causal.config_class, exist_ok=True)
    AutoModel.register(causal.config_class, causal.decoder_class, exist_ok=True)
    AutoModelForCausalLM.register(causal.config_class, causal, exist_ok=True)
    # So that save_pretrained puts this file beside the weights.
    causal.config_class.register_for_auto_class()
    causal.decoder_class.register_for_auto_class("AutoModel")
    causal.register_for_auto_class("AutoModelForCausalLM")
