"""The parts of the vLLM plugin that need no vLLM."""

from __future__ import annotations

import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from helpers.models import tiny_config

from pgprune_cli.serving.modeling_pruned import FAMILIES
from pgprune_cli.serving.vllm_plugin import check_parallel


def config(*overrides: dict):
    """Return the config of a pruned Llama whose first layers differ from its 4 KV heads and 24 channels."""
    dense = {key: value for key, value in tiny_config("llama-gqa").to_dict().items() if key != "model_type"}
    per_layer = {str(index): layer for index, layer in enumerate(overrides)}
    return FAMILIES["llama"].config_class(**dense | {"per_layer_config": per_layer})


def heads(kv_heads: int) -> dict[str, int]:
    return {"num_attention_heads": 2 * kv_heads, "num_key_value_heads": kv_heads}


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_layers_that_can_be_split_are_accepted(degree):
    check_parallel(config(heads(4), heads(2) | {"intermediate_size": 8}, {"skip": ["attention"]}), degree)


@pytest.mark.parametrize(
    ("layer", "degree", "description"),
    [
        (heads(3), 2, "3 KV heads with 6 query heads"),
        (heads(1), 4, "1 KV heads with 2 query heads"),
        ({"intermediate_size": 9}, 2, "9 FFN channels"),
        (heads(3) | {"intermediate_size": 9}, 2, "3 KV heads with 6 query heads and 9 FFN channels"),
    ],
)
def test_a_layer_that_cannot_be_split_is_named_with_the_option_to_use(layer, degree, description):
    with pytest.raises(
        ValueError, match=rf"of {degree}: cannot split layer 1, which has {description}\. .*--pad-kv-heads {degree}"
    ):
        check_parallel(config(heads(4), layer), degree)


def test_a_skipped_block_need_not_be_split():
    check_parallel(config({"skip": ["mlp"], "intermediate_size": 9}, {"skip": ["attention"], **heads(3)}), 2)


def test_the_entry_point_in_pyproject_is_the_plugin():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["pgprune"].partition(":")
    assert callable(getattr(import_module(module), function))
