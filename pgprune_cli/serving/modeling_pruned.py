"""Models pruned by pgprune, for transformers: Llama, Mistral, Qwen2 and Qwen3 whose layers differ in their sizes.

This file is part of every exported model directory that needs it, and transformers runs it if `trust_remote_code=True`
is given. It does not need pgprune. If pgprune is installed, `import pgprune_cli.serving.modeling_pruned` has the same
effect without `trust_remote_code`.

The config's `per_layer_config` holds the sizes, as transformers 5.14 and later defines it: by layer index, the values
that differ from those of the dense model. `"skip": ["attention"]` or `"skip": ["mlp"]` means that the layer has no such
block. `output_biases` lists the blocks that have an output bias in every layer although the dense model has none.
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
    """What the configs below add to those of transformers."""

    def validate_architecture(self) -> None:
        """Accept any number of heads: head_dim is set, so the hidden size need not be a multiple of them."""

    def of_layer(self, overrides: dict):
        """Return the config of one layer: its own sizes, and in `skip` the blocks that it lacks."""
        layer = copy.copy(self)
        layer.per_layer_config = None
        for name, value in ({"skip": []} | overrides).items():
            setattr(layer, name, value)
        return layer

    def of_layers(self) -> list:
        """Return the configs of all layers in order."""
        # With to_dict, because the attribute is a dict in older versions of transformers and a view in newer ones.
        overrides = {int(index): values for index, values in (self.to_dict().get("per_layer_config") or {}).items()}
        return [self.of_layer(overrides.get(index, {})) for index in range(self.num_hidden_layers)]


class NoHeads(nn.Module):
    """Runs in place of an attention block without heads: adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor, **_) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class NoChannels(nn.Module):
    """Runs in place of a feed-forward block without channels: adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class PrunedModel:
    """The decoder of transformers, with every layer built from its own config."""

    layer_class: type[nn.Module]

    def __init__(self, config) -> None:
        theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
        # transformers 4 does not know rope_parameters. It would use its default and compute wrong outputs.
        if theta is not None and theta != getattr(config, "rope_theta", theta):
            raise ValueError(f"{config.model_type}: this model's rope_parameters need transformers 5 or later")
        shell = config.of_layer({"num_hidden_layers": 0})  # transformers builds everything except the layers
        super().__init__(shell)
        self.config, config._attn_implementation = config, shell._attn_implementation
        layers = config.of_layers()
        self.layers = nn.ModuleList(self.build(layer, index) for index, layer in enumerate(layers))
        # The cache takes its length from slot 0. So the first layer with heads writes to that slot instead of its own,
        # and the slots of layers without heads stay empty.
        first = next((layer for layer in self.layers if not isinstance(layer.self_attn, NoHeads)), None)
        if first is not None:
            first.self_attn.layer_idx = 0
        self.post_init()

    def build(self, config, index: int) -> nn.Module:
        layer = self.layer_class(config, index)
        # The layers read what may change later (set_attn_implementation) from the config of the whole model.
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
    """The causal model of transformers, around the pruned decoder."""

    decoder_class: type[PreTrainedModel]

    def __init__(self, config) -> None:
        PreTrainedModel.__init__(self, config)  # not that of the dense model, which builds dense layers
        self.model = self.decoder_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def config_class(cls):
    """Make a config a strict dataclass if its base is one, as in newer versions of transformers."""
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
"""The pruned causal model, by the model type of the dense one."""

for causal in FAMILIES.values():
    AutoConfig.register(causal.config_class.model_type, causal.config_class, exist_ok=True)
    AutoModel.register(causal.config_class, causal.decoder_class, exist_ok=True)
    AutoModelForCausalLM.register(causal.config_class, causal, exist_ok=True)
    # So that save_pretrained copies this file next to the weights.
    causal.config_class.register_for_auto_class()
    causal.decoder_class.register_for_auto_class("AutoModel")
    causal.register_for_auto_class("AutoModelForCausalLM")
