"""The config.json of an export: a stock one if all layers have the same sizes, else one with `per_layer_config`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import transformers

from pgprune_cli.errors import UserError
from pgprune_cli.export.dense_model import DenseModel
from pgprune_cli.export.shapes import RuntimeShapes
from pgprune_cli.export.surgery import Surgery
from pgprune_cli.model.families.adapter import ModelFamily, dense_type
from pgprune_cli.model.families.wrapper import SECTION
from pgprune_cli.model.older_keys import ROPE_KEYS, rope_keys, with_both_names
from pgprune_cli.serving import modeling_pruned


def export_config(base: DenseModel, surgery: Surgery, dtype: str | None) -> dict[str, Any]:
    """Return the content of config.json. dtype: of the export, None to keep the base model's."""
    shapes, family = surgery.shapes, base.shape.family
    result = dict(base.json) | {"num_hidden_layers": len(shapes.layers), "head_dim": family.head_dim(base.config)}
    for key in (
        "auto_map",
        "per_layer_config",
        "output_biases",
        "model_file",
    ):  # of a base model that is pruned already
        result.pop(key, None)
    if rope := rope_keys(base.config):
        result = {key: value for key, value in result.items() if key not in ROPE_KEYS} | rope
    if dtype is not None:
        result.pop("torch_dtype", None)  # the older name of the key
        result["dtype"] = dtype
    layers = _layers_to_copy(getattr(base.config, "layer_types", None), surgery)
    for name in family.layer_lists:
        if values := getattr(base.config, name, None):
            result[name] = [values[layer] for layer in layers]
    result |= family.renumbered(base.config, shapes.layers)
    stock = None
    if shapes.uniform and not _output_biases(base, surgery):
        stock = _stock_config(base, shapes)
    result |= _pruned_config(base, surgery) if stock is None else _dense_class(base) | _as_named(base, stock)
    result = with_both_names(result)
    return result if base.wrapper is None else _wrapped(base.wrapper, result, is_stock=stock is not None)


def reorders_attention(config: Mapping[str, Any]) -> bool:
    """Return whether the `layer_types` of a stock config.json differ from those its type has for as many layers.

    That is so if whole layers are removed from a model whose layers take turns. Some runtimes ignore the list.
    """
    from transformers import CONFIG_MAPPING

    decoder = config.get(SECTION, config)
    types = decoder.get("layer_types")
    if types is None or decoder["model_type"] not in CONFIG_MAPPING:
        return False
    usual = CONFIG_MAPPING[decoder["model_type"]].from_dict({**decoder, "layer_types": None})
    return list(types) != list(getattr(usual, "layer_types", None) or types)


def _wrapped(wrapper: Mapping[str, Any], decoder: dict[str, Any], is_stock: bool) -> dict[str, Any]:
    """Return the config.json of a model of text and images, given that of its base model and the decoder's config."""
    for key in ("auto_map", "architectures"):  # those of the whole model count
        decoder.pop(key, None)
    result = {key: value for key, value in wrapper.items() if key not in ("auto_map", "torch_dtype")}
    names_of_dtype = ("dtype", "torch_dtype")  # the second is the older one
    if dtype := next((part[key] for part in (decoder, wrapper) for key in names_of_dtype if part.get(key)), None):
        result["dtype"] = dtype
    kind = dense_type(wrapper["model_type"])
    causal: Any = modeling_pruned.WRAPPERS[kind]
    names: dict[str, Any] = {"model_type": kind, "architectures": [causal.__name__.removeprefix("Pruned")]}
    if not is_stock:
        classes = {"AutoConfig": causal.config_class, "AutoModelForImageTextToText": causal}
        names = {"model_type": causal.config_class.model_type, "architectures": [causal.__name__]}
        names["auto_map"] = {auto: f"modeling_pruned.{cls.__name__}" for auto, cls in classes.items()}
    return result | names | {SECTION: decoder}


def _stock_config(base: DenseModel, shapes: RuntimeShapes) -> dict[str, Any] | None:
    """Return what changes in the config if blocks of the same kind have the same sizes, None if no class fits."""
    family, pairs = shapes.dense.family, list(zip(shapes.layers, shapes.sizes(), strict=True))
    full = next(kept for layer, kept in pairs if not shapes.dense.is_recurrent(layer))
    stock = family.stock_config(base.config, full)
    if stock is None:
        return None
    recurrent = (kept[family.attention.name][0] for layer, kept in pairs if shapes.dense.is_recurrent(layer))
    return stock | next((family.recurrent_config(base.config, groups) for groups in recurrent), {})


def _as_named(base: DenseModel, changes: dict[str, Any]) -> dict[str, Any]:
    """Return changes of the config under the names that the base's config.json has for them: some keys have two."""
    aliases = dict(getattr(type(base.config), "attribute_map", {}))
    aliases |= {second: first for first, second in aliases.items()}
    names = {key: aliases[key] for key in changes if key not in base.json and aliases.get(key) in base.json}
    return {names.get(key, key): value for key, value in changes.items()}


def _output_biases(base: DenseModel, surgery: Surgery) -> list[str]:
    """Return the blocks that have an output bias that the class of transformers lacks, as the config has them."""
    ours = {block.config_name for block in base.shape.family.blocks if block.name in surgery.new_biases}
    return sorted(ours.union(base.json.get("output_biases", [])))


def _dense_class(base: DenseModel) -> dict[str, Any]:
    """Return what makes the config that of a stock class again, if the base model is pruned already."""
    kind = base.config.model_type
    if kind == dense_type(kind):
        return {}
    return {"model_type": dense_type(kind), "architectures": [_causal_class(base).__name__.removeprefix("Pruned")]}


def _causal_class(base: DenseModel) -> Any:
    """Return the class in modeling_pruned.py that loads the base model's family. Raises UserError."""
    kind = dense_type(base.config.model_type)
    if kind not in modeling_pruned.FAMILIES:
        raise UserError(
            f"model type {kind}: transformers {transformers.__version__} cannot load layers that differ in size. "
            f"Search with budget.scope: per-layer, which keeps the layers alike. Layers may differ in: "
            f"{', '.join(modeling_pruned.FAMILIES)}."
        )
    return modeling_pruned.FAMILIES[kind]


def _layers_to_copy(types: Sequence[str] | None, surgery: Surgery) -> list[int]:
    """Return from which layer of the base model each written layer takes its entry of a list such as layer_types.

    modeling_pruned.py explains why layers without attention take that of another layer.
    """
    layers = surgery.shapes.layers
    with_heads = [layer for layer in layers if surgery.shapes.written[layer].attention.any()] or [0]
    candidates = (*with_heads, *range(surgery.shapes.dense.layers))
    not_linear = (layer for layer in candidates if types is None or types[layer] != "linear_attention")
    shared = next(not_linear, with_heads[0])
    return [layer if layer in with_heads else shared for layer in layers]


def _pruned_config(base: DenseModel, surgery: Surgery) -> dict[str, Any]:
    """Return what changes in the config of a model that needs modeling_pruned.py. Raises UserError."""
    family = base.shape.family
    causal = _causal_class(base)
    shapes = surgery.shapes
    layers = [
        _layer_config(family, base.config, kept, shapes.dense.is_recurrent(layer))
        for layer, kept in zip(shapes.layers, shapes.sizes(), strict=True)
    ]
    dense = base.config.to_dict()
    differences = [{key: value for key, value in layer.items() if dense.get(key) != value} for layer in layers]
    biases = _output_biases(base, surgery)
    return {
        "model_type": causal.config_class.model_type,
        "architectures": [causal.__name__],
        "auto_map": {auto: f"modeling_pruned.{cls.__name__}" for auto, cls in causal.auto_classes.items()},
        "per_layer_config": {str(index): layer for index, layer in enumerate(differences) if layer},
        **({"output_biases": biases} if biases else {}),
    }


def _layer_config(
    family: ModelFamily, config: Any, kept: Mapping[str, tuple[int, int]], is_recurrent: bool
) -> dict[str, Any]:
    """Return the sizes of one layer, and `skip` with its missing blocks, as `per_layer_config` has them."""
    skip = [block.config_name for block in family.blocks if not kept[block.name][0]]
    sizes: dict[str, Any] = {"skip": skip} if skip else {}
    if not is_recurrent:
        return family.layer_config(config, kept) | sizes
    attention = family.attention.name
    groups, _ = kept[attention]
    recurrent = family.recurrent_config(config, groups) if groups else {}
    return family.layer_config(config, {**kept, attention: (0, 1)}) | recurrent | sizes
