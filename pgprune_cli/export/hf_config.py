"""The config.json of a pruned model: a stock one where all layers are alike, else with `per_layer_config`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pgprune_cli.export.shapes import RuntimeShapes
from pgprune_cli.serving import modeling_pruned

WORDS = {"attention": "attention", "ffn": "mlp"}
"""What transformers calls a block."""


def config_of(
    given: Mapping[str, Any], dense: Any, form: RuntimeShapes, new_biases: Collection[str], dtype: str | None
) -> dict[str, Any]:
    """`given` is the base's config.json, which may leave out defaults; `dense` is what transformers reads it as.

    new_biases: the blocks that have an output bias and had none in the base; dtype: of the result, None: as it was.
    """
    head_dim = getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads
    result = dict(given) | {"num_hidden_layers": len(form.layers), "head_dim": head_dim}
    result.pop("auto_map", None)
    if dtype is not None:
        result.pop("torch_dtype", None)  # its older name
        result["dtype"] = dtype
    if types := getattr(dense, "layer_types", None):
        # A layer without heads stands in the cache for the first that has some: see modeling_pruned.py.
        with_heads = [index for index in form.layers if form.written[index].attention.any()]
        result["layer_types"] = [types[i if i in with_heads else (with_heads or [0])[0]] for i in form.layers]
    stock = _stock(dense, form) if form.uniform and not new_biases else None
    return result | (_pruned(dense, form, new_biases) if stock is None else stock)


def _stock(dense: Any, form: RuntimeShapes) -> dict[str, Any] | None:
    """What differs in the config of a model whose layers are all alike; None where no stock class can express it."""
    sizes = _sizes(*form.sizes()[0], dense)
    if dense.model_type != "llama" or dense.hidden_size % sizes["num_attention_heads"] == 0:
        return sizes
    if dense.attention_bias or dense.mlp_bias:
        return None
    # Llama's config refuses this number of heads; Mistral's is the same model and does not ask.
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    return sizes | mistral | {"max_position_embeddings": dense.max_position_embeddings}


def _pruned(dense: Any, form: RuntimeShapes, new_biases: Collection[str]) -> dict[str, Any]:
    """What differs in the config of a model that takes modeling_pruned.py along."""
    causal: Any = modeling_pruned.FAMILIES[dense.model_type]
    classes = {"AutoConfig": causal.config_class, "AutoModel": causal.decoder_class, "AutoModelForCausalLM": causal}
    whole = _sizes(dense.num_key_value_heads, dense.intermediate_size, dense)
    sizes = [_sizes(*counts, dense) for counts in form.sizes()]
    differing = [{key: value for key, value in size.items() if whole.get(key) != value} for size in sizes]
    biases = [word for block, word in WORDS.items() if block in new_biases]
    return {
        "model_type": causal.config_class.model_type,
        "architectures": [causal.__name__],
        "auto_map": {auto: f"modeling_pruned.{cls.__name__}" for auto, cls in classes.items()},
        "per_layer_config": {str(index): size for index, size in enumerate(differing) if size},
        **({"output_biases": biases} if biases else {}),
    }


def _sizes(groups: int, channels: int, dense: Any) -> dict[str, Any]:
    """A layer in the words of `per_layer_config`."""
    heads = groups * (dense.num_attention_heads // dense.num_key_value_heads)
    sizes: dict[str, Any] = {"num_attention_heads": heads, "num_key_value_heads": groups} if groups else {}
    sizes |= {"intermediate_size": channels} if channels else {}
    skip = [word for word, count in zip(WORDS.values(), (groups, channels), strict=True) if not count]
    return sizes | ({"skip": skip} if skip else {})
