"""The family adapters: every supported model type is covered, and what exports ask of an adapter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers.models import ARCHITECTURES, EXPERT_ARCHITECTURES, tiny_config, tiny_model
from torch import nn

import pgprune_cli
from pgprune_cli.errors import UserError
from pgprune_cli.model.families import FAMILIES, begins_with_bos, family_of, refuse_units
from pgprune_cli.model.prunable import PrunableModel


def test_every_supported_model_type_is_tested() -> None:
    tested = {tiny_config(architecture).model_type for architecture in (*ARCHITECTURES, *EXPERT_ARCHITECTURES)}
    assert tested == {model_type for family in FAMILIES for model_type in family.model_types}


def test_an_unsupported_model_type_is_refused() -> None:
    supported = [name for family in FAMILIES for name in family.model_types]
    with pytest.raises(UserError, match=r"'gpt2' is not supported.*llama, mistral, qwen2, qwen3") as caught:
        family_of("gpt2")
    assert all(name in str(caught.value) for name in supported)


def test_a_pruned_model_belongs_to_the_family_of_its_base(architecture: str) -> None:
    model_type = tiny_config(architecture).model_type
    assert family_of(f"pruned_{model_type}") is family_of(model_type)


def test_linears_are_all_linear_layers_of_a_layer_in_order() -> None:
    layer = tiny_model("llama-gqa").model.layers[0]
    linears = list(family_of("llama").linears(layer))
    assert [(block.name, projection) for block, projection, _ in linears] == [
        *[("attention", name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")],
        *[("ffn", name) for name in ("gate_proj", "up_proj", "down_proj")],
    ]
    expected = {id(module) for module in layer.modules() if isinstance(module, nn.Linear)}
    assert {id(linear) for _, _, linear in linears} == expected


def test_unit_tensors_describe_every_row_of_their_tensors(architecture: str) -> None:
    """Parts cover the axis, runs belong to elements or groups, and the output's weight is the last."""
    model = PrunableModel.of(tiny_model(architecture))
    for layer in model.layers:
        for block in model.family.blocks_of(layer):
            grid, module = model.family.grid(layer, block), layer.get_submodule(block.module)
            tensors = model.family.unit_tensors(layer, block)
            assert len({tensor.name for tensor in tensors}) == len(tensors)
            assert tensors[-1].module == block.output and tensors[-1].key != "bias" and len(tensors[-1].parts) == 1
            for tensor in tensors:
                shape = module.get_parameter(tensor.name).shape
                assert sum(part.rows for part in tensor.parts) == shape[tensor.axis]
                runs = {part.runs for part in tensor.parts}
                assert runs <= ({grid.members} if tensor.stacked else {grid.elements, grid.groups})
                assert not tensor.stacked or shape[0] == grid.groups


def test_sizes_and_layer_config_agree_with_the_config(architecture: str) -> None:
    config, family = tiny_config(architecture), family_of(tiny_config(architecture).model_type)
    model = PrunableModel.of(tiny_model(architecture))
    sizes = {name: (grids[-1].groups, grids[-1].members) for name, grids in model.shape.grids.items()}
    written = family.layer_config(config, sizes)
    assert written == {name: getattr(config, name) for name in written} and len(written) >= 3
    assert family.layer_config(config, {"attention": (0, 0), "ffn": (0, 0)}) == {}
    assert family.head_dim(config) == 8


def test_layer_config_holds_query_heads_and_kv_heads() -> None:
    sizes = family_of("llama").layer_config(tiny_config("llama-gqa"), {"attention": (3, 1), "ffn": (1, 7)})
    assert sizes == {"num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 7}


def test_families_refuse_units_with_a_reason_and_a_way_out(architecture: str) -> None:
    model_type = tiny_config(architecture).model_type
    family = family_of(model_type)
    for block in family.blocks:
        if reason := family.refusal(model_type, block.name):
            assert reason.endswith(".")
            with pytest.raises(UserError, match=r"^units\.families: .* Set units\.families to \["):
                refuse_units(model_type, [block.name])
        else:
            refuse_units(model_type, [block.name])
    refuse_units(model_type, [f"{block.name}-block" for block in family.blocks])


def test_every_model_type_has_gguf_architectures() -> None:
    for family in FAMILIES:
        assert set(family.gguf) == set(family.model_types)


@pytest.mark.parametrize(
    ("architecture", "heads", "expected"),
    [
        ("llama-gqa", (2, 2), {"num_attention_heads": 4}),
        ("llama-gqa", (2, 1), {"num_attention_heads": 2, "num_key_value_heads": 2}),
        ("llama-gqa", (3, 2), {"num_attention_heads": 6, "model_type": "mistral", "sliding_window": None}),
        ("llama-biased", (3, 2), None),
        ("qwen3", (3, 2), {"num_attention_heads": 6}),
        ("qwen3", (3, 1), {"num_attention_heads": 3, "num_key_value_heads": 3}),
    ],
)
def test_stock_config_avoids_head_counts_that_a_llama_config_refuses(
    architecture: str, heads: tuple[int, int], expected: dict[str, Any] | None
) -> None:
    """The hidden size is 32, which 6 heads do not divide. Mistral's config accepts that, but has no biases."""
    config = tiny_config(architecture)
    changes = family_of(config.model_type).stock_config(config, {"attention": heads, "ffn": (1, 7)})
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
