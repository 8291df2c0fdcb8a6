"""The family adapters: every supported model type is covered, and what exports ask of an adapter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers.messages import refused
from helpers.models import ARCHITECTURES, tiny_config, tiny_model
from torch import nn

import pgprune_cli
from pgprune_cli.model.families import FAMILIES, begins_with_bos, family_of, family_of_export


def test_every_supported_model_type_is_tested() -> None:
    tested = {tiny_config(architecture).model_type for architecture in ARCHITECTURES}
    assert tested == {model_type for family in FAMILIES for model_type in family.model_types}


def test_an_unsupported_model_type_is_refused() -> None:
    with refused("'phi3' is not supported", "llama, mistral, qwen2, qwen3"):
        family_of("phi3")


def test_a_model_that_is_pruned_already_is_refused() -> None:
    with refused("already pruned"):
        family_of("pruned_llama")
    assert family_of_export("pruned_llama") is family_of("llama")


def test_linears_are_all_linear_layers_of_a_layer_in_order() -> None:
    layer = tiny_model("llama-gqa").model.layers[0]
    linears = list(family_of("llama").linears(layer))
    assert [(block.name, projection.name, projection.axis) for block, projection, _ in linears] == [
        *[("attention", name, axis) for name, axis in (("q_proj", 0), ("k_proj", 0), ("v_proj", 0), ("o_proj", 1))],
        *[("ffn", name, axis) for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1))],
    ]
    expected = {id(module) for module in layer.modules() if isinstance(module, nn.Linear)}
    assert {id(linear) for _, _, linear in linears} == expected


def test_units_and_layer_config_agree_with_the_config(architecture: str) -> None:
    config, family = tiny_config(architecture), family_of(tiny_config(architecture).model_type)
    units = family.units(tiny_model(architecture).model.layers[0])
    assert units == {"attention": 4, "ffn": 24}
    sizes = family.layer_config(config, units)
    assert sizes == {name: getattr(config, name) for name in sizes} and len(sizes) == 3
    assert family.layer_config(config, {"attention": 0, "ffn": 0}) == {}
    assert family.head_dim(config) == 8


def test_every_model_type_has_gguf_architectures() -> None:
    for family in FAMILIES:
        assert set(family.gguf) == set(family.model_types)


@pytest.mark.parametrize(
    ("architecture", "kv_heads", "expected"),
    [
        ("llama-gqa", 2, {"num_attention_heads": 4}),
        ("llama-gqa", 3, {"num_attention_heads": 6, "model_type": "mistral", "sliding_window": None}),
        ("llama-biased", 3, None),
        ("qwen3", 3, {"num_attention_heads": 6}),
    ],
)
def test_stock_config_avoids_head_counts_that_a_llama_config_refuses(
    architecture: str, kv_heads: int, expected: dict[str, Any] | None
) -> None:
    """The hidden size is 32, which 6 heads do not divide. Mistral's config accepts that, but has no biases."""
    config = tiny_config(architecture)
    changes = family_of(config.model_type).stock_config(config, {"attention": kv_heads, "ffn": 7})
    if expected is None:
        assert changes is None
    else:
        assert changes is not None and changes | expected == changes and changes["intermediate_size"] == 7
        assert ("model_type" in changes) == ("model_type" in expected)


def test_only_adapters_and_modelling_code_know_the_names_of_modules() -> None:
    names = re.compile(r"\b([qkvo]|gate|up|down)_proj\b|\bself_attn\b|\"attention\" ==|== \"attention\"")
    package = Path(pgprune_cli.__file__).parent
    allowed = (package / "model" / "families", package / "serving", package / "core" / "space.py")
    sources = [path for path in package.rglob("*.py") if not any(path.is_relative_to(place) for place in allowed)]
    assert len(sources) > 100
    assert [path for path in sources if names.search(path.read_text(encoding="utf-8"))] == []


def test_no_family_of_llama_begins_with_bos() -> None:
    """The literature measures these on windows without BOS."""
    for model_type in ("llama", "mistral", "qwen2", "qwen3", "pruned_llama", "unknown"):
        assert not begins_with_bos(model_type)


def test_families_name_only_their_own_types_as_beginning_with_bos() -> None:
    for family in FAMILIES:
        assert set(family.bos_types) <= set(family.model_types)
        for model_type in family.bos_types:
            assert begins_with_bos(model_type) and begins_with_bos(f"pruned_{model_type}")
