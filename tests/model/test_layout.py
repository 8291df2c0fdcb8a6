"""Layers that differ from what their adapter describes, and units that a family cannot lose, are refused unread."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.messages import refused
from helpers.models import save_tokenizer, tiny_config, tiny_model
from torch import nn

from pgprune_cli.jobs.compare import compare
from pgprune_cli.jobs.doctor import doctor
from pgprune_cli.jobs.estimate import estimate
from pgprune_cli.jobs.init_scores import init_scores
from pgprune_cli.jobs.new_recipe import new_recipe
from pgprune_cli.jobs.search import search
from pgprune_cli.model.families.layout import check_layout
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.quantized import quantize_projections


def test_layers_of_every_family_are_what_its_adapter_describes(architecture: str) -> None:
    model = tiny_model(architecture)
    prunable = PrunableModel.of(model)
    check_layout(prunable.family, model.config.model_type, list(prunable.layers))
    quantize_projections(model, "int8")
    check_layout(prunable.family, model.config.model_type, list(prunable.layers))


def test_a_layer_with_weights_that_its_adapter_does_not_know_is_refused() -> None:
    model = tiny_model("llama-gqa")
    model.model.layers[2].shared_mlp = nn.Linear(32, 32)
    with refused("layer 2", "llama", "shared_mlp.weight", "mlp (gate_proj, up_proj, down_proj)"):
        PrunableModel.of(model)


def test_a_layer_with_another_matrix_inside_a_block_is_refused() -> None:
    model = tiny_model("llama-gqa")
    model.model.layers[0].mlp.adapter = nn.Linear(32, 24, bias=False)
    with refused("layer 0", "mlp.adapter.weight"):
        PrunableModel.of(model)


def test_a_layer_whose_block_is_another_module_is_refused() -> None:
    model = tiny_model("llama-gqa")
    model.model.layers[1].mlp = nn.Sequential(nn.Linear(32, 32))
    with refused("layer 1", "another mlp", "down_proj"):
        PrunableModel.of(model)


def test_a_tensor_with_other_rows_than_described_is_refused() -> None:
    model = tiny_model("qwen3")
    model.model.layers[3].self_attn.q_proj = nn.Linear(32, 128, bias=False)  # with an output gate, for example
    with refused("layer 3", "128 rows", "self_attn.q_proj.weight", "64"):
        PrunableModel.of(model)


@pytest.fixture
def olmo(tmp_path: Path) -> Path:
    """An OLMo 2 without weights: only its config and its tokenizer can be read."""
    tiny_config("olmo2").save_pretrained(tmp_path / "olmo")
    save_tokenizer(tmp_path / "olmo")
    (tmp_path / "olmo" / "model.safetensors").write_bytes(b"")
    return tmp_path / "olmo"


@pytest.mark.parametrize("metric", ["obs", "magnitude"])
@pytest.mark.parametrize("job", [init_scores, search, compare])
def test_heads_of_olmo_are_refused_before_any_weight_is_read(
    job, metric: str, olmo: Path, tmp_path: Path, small
) -> None:
    recipe = small(f"model={olmo}", f"scores.metric={metric}")
    with refused("units.families", "olmo2", "all heads together", "[ffn]"):
        job(recipe, tmp_path / "run")


def test_a_dry_run_refuses_heads_of_olmo(olmo: Path, small) -> None:
    with refused("units.families", "olmo2", "[ffn]"):
        estimate(small(f"model={olmo}"))


def test_doctor_reports_heads_of_olmo(olmo: Path, small) -> None:
    findings = [finding for finding in doctor(small(f"model={olmo}")) if finding.name == "model"]
    assert [finding.status for finding in findings] == ["FAIL"] and "[ffn]" in findings[0].fix


def test_a_new_recipe_for_olmo_prunes_channels_only_and_says_why(olmo: Path) -> None:
    (olmo / "model.safetensors").unlink()  # the config is enough
    recipe, text = new_recipe(str(olmo))
    assert recipe.units.families == ("ffn",)
    assert "families: [ffn]  # q and k of olmo2 are normalised over all heads together" in text
    with refused("units.families", "[ffn]"):
        new_recipe(str(olmo), overrides=["units.families=[attention, ffn]"])


def test_norms_of_zeros_add_nothing_where_a_block_of_olmo_is_removed() -> None:
    """The placeholder's zeros pass the norm behind the block."""
    layer = tiny_model("olmo2").model.layers[0]
    assert not layer.post_attention_layernorm(torch.zeros(1, 3, 32)).any()
