"""Models pruned by pgprune, for transformers: decoders of many families whose layers differ in their sizes.

This file is part of every exported model directory that needs it, and transformers runs it if `trust_remote_code=True`
is given. It does not need pgprune. If pgprune is installed, `import pgprune_cli.serving.modeling_pruned` has the same
effect without `trust_remote_code`.

The config's `per_layer_config` holds the sizes, as transformers 5.14 and later defines it: by layer index, the values
that differ from those of the dense model. `"skip": ["attention"]` or `"skip": ["mlp"]` means that the layer has no such
block and none of the block's norms. `output_biases` lists the blocks that have an output bias in every layer although
the dense model has none. `layer_types` names the kind of attention of every layer; a layer without attention has the
kind of a layer that has some, but not linear attention, so that it can count the tokens in its slot of the cache.
"""

import copy
import dataclasses
import functools
import importlib
from typing import NamedTuple

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, PreTrainedModel, modeling_layers


class Norms(NamedTuple):
    """The norms of a layer's two blocks. They are removed together with the block."""

    attention: tuple[str, ...]
    mlp: tuple[str, ...]


BEFORE = Norms(("input_layernorm",), ("post_attention_layernorm",))
AFTER = Norms(("post_attention_layernorm",), ("post_feedforward_layernorm",))
AROUND = Norms(
    ("input_layernorm", "post_attention_layernorm"), ("pre_feedforward_layernorm", "post_feedforward_layernorm")
)


class Family(NamedTuple):
    """Where transformers keeps a family. Its classes are called `name` and Config, Model, DecoderLayer, ForCausalLM."""

    module: str
    name: str
    norms: Norms = BEFORE
    text: str = ""
    """What the names of the config and the model contain besides, if the module also has a model of text and images."""
    oldest: int = 5
    """The oldest major version of transformers that computes the family as this file needs it."""
    mlp_returns_pair: bool = False
    files_differ: bool = False
    """Whether files have other names than the model: one matrix per expert, which transformers puts together."""


DENSE = {
    "llama": Family("llama", "Llama", oldest=4),
    "mistral": Family("mistral", "Mistral", oldest=4),
    "qwen2": Family("qwen2", "Qwen2", oldest=4),
    "qwen3": Family("qwen3", "Qwen3", oldest=4),
    "smollm3": Family("smollm3", "SmolLM3"),
    "granite": Family("granite", "Granite"),
    "ministral3": Family("ministral3", "Ministral3"),
    "seed_oss": Family("seed_oss", "SeedOss"),
    "phi3": Family("phi3", "Phi3"),
    "gemma": Family("gemma", "Gemma"),
    "gemma2": Family("gemma2", "Gemma2", AROUND),
    "gemma3_text": Family("gemma3", "Gemma3", AROUND, text="Text"),
    "olmo2": Family("olmo2", "Olmo2", AFTER),
    "olmo3": Family("olmo3", "Olmo3", AFTER),
    "mixtral": Family("mixtral", "Mixtral", files_differ=True),
    "qwen3_moe": Family("qwen3_moe", "Qwen3Moe", files_differ=True),
    "gpt_oss": Family("gpt_oss", "GptOss", mlp_returns_pair=True),
    "qwen3_5_text": Family("qwen3_5", "Qwen3_5", text="Text"),
}
"""The families by the model type of the dense model."""

BLOCKS = {"self_attn": "attention", "linear_attn": "attention", "mlp": "mlp"}
"""The names that the config uses for the blocks, by the names of their modules."""
OUTPUTS = {"self_attn": "o_proj", "linear_attn": "out_proj", "mlp": "down_proj"}
TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
"""The tasks with a head of their own, for fine-tuning. transformers has one class for each, which fits all decoders."""
SHARED = "_implementation_internal"
"""How the names of settings end that the user may change after loading, like the implementation of the attention."""


COUNTED = 64
"""Numbers per token that a layer without attention writes to the cache: a group of a quantized one."""


class PrunedConfig:
    """What the configs below add to those of transformers."""

    def validate_architecture(self) -> None:
        """Accept any number of heads: head_dim is set, so the hidden size need not be a multiple of them."""

    def validate_rope(self) -> None:
        """Validate with the sizes of the dense model, because those of the layers differ."""
        self.check_dense_rope()

    def check_dense_rope(self, **options) -> None:
        super(PrunedConfig, self.of_layer({})).validate_rope(**options)

    def __getattr__(self, name: str):
        """Return the current setting of the whole model if this is the config of one layer."""
        if name.endswith(SHARED) and "whole" in vars(self):
            return getattr(self.whole, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name}")

    def of_layer(self, overrides: dict):
        """Return the config of one layer: its own sizes, and in `skip` the blocks that it lacks."""
        layer = copy.copy(self)
        layer.per_layer_config = None
        for name, value in ({"skip": [], "whole": self} | overrides).items():
            setattr(layer, name, value)
        for name in [name for name in vars(layer) if name.endswith(SHARED)]:
            delattr(layer, name)
        return layer

    def of_layers(self) -> list:
        """Return the configs of all layers in order."""
        # With to_dict, because the attribute is a dict in older versions of transformers and a view in newer ones.
        overrides = {int(index): values for index, values in (self.to_dict().get("per_layer_config") or {}).items()}
        return [self.of_layer(overrides.get(index, {})) for index in range(self.num_hidden_layers)]


class Nothing(nn.Module):
    """Runs in place of a removed block: adds nothing to the residual stream.

    pair: the block returns two values; slot: of a removed attention in the cache. There it counts the tokens, because
    transformers takes the length of the cache and the sizes of masks from the first slot of each kind, crops the cache
    after every draft of a smaller model, and fetches an offloaded slot while the one before it is filled.
    """

    def __init__(self, pair: bool, slot: int | None = None) -> None:
        super().__init__()
        self.pair, self.slot = pair, slot

    def forward(self, hidden_states: torch.Tensor, *_, **kwargs):
        zeros = torch.zeros_like(hidden_states)
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # its name depends on the version of transformers
        if self.slot is not None and cache is not None:
            counted = torch.ones_like(zeros[:, None, :, :COUNTED])  # transformers 4 does not count zeros
            cache.update(counted, counted, self.slot, {"cache_position": kwargs.get("cache_position")})
        return (zeros, None) if self.pair else zeros


class Pruned:
    """What the decoder and the causal model have in common."""

    dense: type[PreTrainedModel]

    def init_without_layers(self, config) -> None:
        """Let transformers build everything except the layers."""
        shell = config.of_layer({"num_hidden_layers": 0})
        super().__init__(shell)
        for name in [name for name in vars(shell) if name.endswith(SHARED)]:
            setattr(config, name, vars(shell).pop(name))
        self.config = config

    def _get_static_cache_init_shape(self) -> None:
        """Let every slot of a static cache take its shape from what is written to it: little, without attention."""

    # transformers looks for the answer in the source of a model's module, which is not this one.
    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return cls.dense._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls.dense._can_set_experts_implementation()

    def _grouped_mm_can_dispatch(self) -> bool:
        """Raise ValueError if grouped_mm, the default of transformers, does not compute experts of these sizes."""
        super()._grouped_mm_can_dispatch()
        for layer in vars(self.config).get("whole", self.config).of_layers():
            width = getattr(layer, "moe_intermediate_size", layer.intermediate_size)
            if width % 8:  # rows of 16-bit weights must be multiples of 16 bytes
                raise ValueError(f"experts of {width} channels: grouped_mm needs a multiple of 8")
        return True


class PrunedModel(Pruned):
    """The decoder of transformers, with every layer built from its own config."""

    family: Family
    layer_class: type[nn.Module]

    def __init__(self, config) -> None:
        refuse_unknown_rope(config)
        self.init_without_layers(config)
        self.layers = nn.ModuleList(self.build(layer, index) for index, layer in enumerate(config.of_layers()))
        self.post_init()

    def build(self, config, index: int) -> nn.Module:
        layer = self.layer_class(config, index)
        for module, block in BLOCKS.items():
            if not hasattr(layer, module):
                continue
            if block in config.skip:
                pair = self.family.mlp_returns_pair if block == "mlp" else module == "self_attn"
                setattr(layer, module, Nothing(pair, slot=index if module == "self_attn" else None))
                for norm in getattr(self.family.norms, block):
                    setattr(layer, norm, nn.Identity())
            elif block in (getattr(config, "output_biases", None) or ()):
                linear = getattr(getattr(layer, module), OUTPUTS[module])
                setattr(getattr(layer, module), OUTPUTS[module], nn.Linear(linear.in_features, linear.out_features))
        return layer


def with_equal_router_logits(forward):
    """Return a decoder's forward that gives the router logits of every layer one width, for the load-balancing loss.

    transformers adds up the experts of all layers by their number. An expert that a layer lacks has the logit -inf.
    """

    @functools.wraps(forward)
    def run(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        if logits := getattr(outputs, "router_logits", None):
            dense = self.config.of_layer({})
            experts = dense.num_experts if hasattr(dense, "num_experts") else dense.num_local_experts
            outputs.router_logits = tuple(
                nn.functional.pad(layer, (0, experts - layer.shape[-1]), value=-torch.inf) for layer in logits
            )
        return outputs

    return run


class PrunedWithHead(Pruned):
    """A model of transformers with a head, around the pruned decoder: the causal model, or one for another task."""

    decoder_class: type[PreTrainedModel]
    base_model_prefix = "model"

    def __init__(self, config) -> None:
        self.init_without_layers(config)
        self.model = self.decoder_class(config)
        self.post_init()


def refuse_unknown_rope(config) -> None:
    """Raise ValueError if transformers is too old to know rope_parameters, and would use other ones.

    transformers 4 reads rope_theta, rope_scaling and partial_rotary_factor, which exports have as well.
    """
    rope = getattr(config, "rope_parameters", None)
    if transformers_major() >= 5 or not rope:
        return
    used = {"rope_type": "default", "rope_theta": config.rope_theta} | (getattr(config, "rope_scaling", None) or {})
    if (share := getattr(config, "partial_rotary_factor", None)) is not None:
        used["partial_rotary_factor"] = share
    if without_old_name(used) != without_old_name(rope):
        raise ValueError(f"{config.model_type}: this model's rope_parameters need transformers 5 or later")


def without_old_name(rope: dict) -> dict:
    """Return the settings without `type`, the old name of rope_type."""
    return {key: value for key, value in rope.items() if key != "type"}


def transformers_major() -> int:
    return int(transformers.__version__.split(".")[0])


def define(name: str, bases: tuple[type, ...], **attributes) -> type:
    """Return a new class, which is also an attribute of this module, where transformers looks for it."""
    globals()[name] = cls = type(name, bases, {"__module__": __name__, "__doc__": bases[0].__doc__} | attributes)
    return cls


def define_family(model_type: str, family: Family) -> type[PreTrainedModel]:
    """Define the config, the decoder and the models with heads of a family, and return the causal one.

    Its `auto_classes` has all classes by the auto class that loads them. Raises ImportError.
    """
    module = importlib.import_module(f"transformers.models.{family.module}.modeling_{family.module}")
    configs = importlib.import_module(f"transformers.models.{family.module}.configuration_{family.module}")
    config_name, model_name, causal_name = (
        f"{family.name}{suffix}" for suffix in (f"{family.text}Config", f"{family.text}Model", "ForCausalLM")
    )
    base, dense, causal = getattr(configs, config_name), getattr(module, model_name), getattr(module, causal_name)
    config = define(f"Pruned{config_name}", (PrunedConfig, base), model_type=f"pruned_{model_type}")
    if dataclasses.is_dataclass(base):  # in newer versions of transformers
        config = strict(config)  # which allows validate_rope no options
    else:
        config.validate_rope = PrunedConfig.check_dense_rope
    layer = getattr(module, f"{family.name}DecoderLayer")
    parts = {"config_class": config, "dense": dense, "family": family, "layer_class": layer}
    if hasattr(module, "load_balancing_loss_func"):
        parts["forward"] = with_equal_router_logits(dense.forward)
    model = define(f"Pruned{model_name}", (PrunedModel, dense), **parts)
    parts = {"config_class": config, "decoder_class": model}
    auto_classes = {"AutoConfig": config, "AutoModel": model}
    for task in TASKS:
        generic = getattr(modeling_layers, f"GenericFor{task}")
        bases = (PrunedWithHead, generic, getattr(module, f"{family.name}PreTrainedModel"))
        auto_classes[f"AutoModelFor{task}"] = define(
            f"Pruned{family.name}{family.text}For{task}", bases, dense=dense, **parts
        )
    defined = define(f"Pruned{causal_name}", (PrunedWithHead, causal), dense=causal, **parts)
    defined.auto_classes = auto_classes | {"AutoModelForCausalLM": defined}
    return defined


def register(causal) -> None:
    """Let the auto classes of transformers load a family, and save_pretrained copy this file next to the weights."""
    config = causal.config_class
    AutoConfig.register(config.model_type, config, exist_ok=True)
    config.register_for_auto_class()
    for name, cls in causal.auto_classes.items():
        if cls is not config:
            getattr(transformers, name).register(config, cls, exist_ok=True)
            cls.register_for_auto_class(name)


def register_names_in_files(model_type: str) -> None:
    """Let transformers read the files of a pruned model as those of the dense one."""
    from transformers import conversion_mapping

    names = conversion_mapping.get_checkpoint_conversion_mapping(model_type)
    if names is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(f"pruned_{model_type}", names, overwrite=True)


FAMILIES: dict[str, type[PreTrainedModel]] = {}
"""The pruned causal model, by the model type of the dense one. Lacks families that transformers is too old for."""

for dense_type, described in DENSE.items():
    if transformers_major() >= described.oldest:
        try:
            FAMILIES[dense_type] = define_family(dense_type, described)
        except ImportError:
            continue
        register(FAMILIES[dense_type])
        if described.files_differ:
            register_names_in_files(dense_type)


class PrunedWrapperConfig:
    """What the config of a model of text and images adds to that of transformers."""

    def __post_init__(self, **kwargs) -> None:
        if isinstance(self.text_config, dict):  # transformers would take the class of the dense decoder
            self.text_config = AutoConfig.for_model(**self.text_config)
        super().__post_init__(**kwargs)


def define_wrapper(model_type: str, name: str) -> type[PreTrainedModel]:
    """Define and register the config and the model of text and images around a pruned decoder; return the model.

    Raises ImportError if transformers is too old for it.
    """
    from transformers import AutoModelForImageTextToText

    module = importlib.import_module(f"transformers.models.{model_type}")
    pruned, base, dense = f"pruned_{model_type}", getattr(module, f"{name}Config"), f"{name}ForConditionalGeneration"
    if not dataclasses.is_dataclass(base):
        raise ImportError(f"{model_type}: this version of transformers builds configs in another way")
    config = strict(define(f"Pruned{base.__name__}", (PrunedWrapperConfig, base), model_type=pruned))
    wrapper = define(f"Pruned{dense}", (getattr(module, dense),), config_class=config)
    wrapper._get_static_cache_init_shape = Pruned._get_static_cache_init_shape
    register_names_in_files(model_type)
    AutoConfig.register(pruned, config, exist_ok=True)
    AutoModelForImageTextToText.register(config, wrapper, exist_ok=True)
    config.register_for_auto_class()
    wrapper.register_for_auto_class("AutoModelForImageTextToText")
    return wrapper


WRAPPERS: dict[str, type[PreTrainedModel]] = {}
"""The models of text and images around a pruned decoder, by the model type of the dense one."""

if transformers_major() >= 5:
    for kind, name in (("mistral3", "Mistral3"), ("gemma3", "Gemma3"), ("qwen3_5", "Qwen3_5")):
        try:
            WRAPPERS[kind] = define_wrapper(kind, name)
        except ImportError:
            continue
