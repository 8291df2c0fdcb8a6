"""recipes new, search MODEL: a recipe for a model, from its config alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.messages import refused
from helpers.models import EXPERT_ARCHITECTURES, tiny_config, tiny_model

from pgprune_cli.jobs import new_recipe as job
from pgprune_cli.jobs.new_recipe import new_recipe, run_name
from pgprune_cli.recipe.reader import find, load


@pytest.fixture
def config_only(tmp_path: Path) -> str:
    """A model directory with a config and no weights, as on the hub before a download."""
    tiny_config("llama-gqa").save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_new_recipe_reads_back_as_the_recipe_it_was_printed_for(tmp_path: Path, architecture: str) -> None:
    tiny_config(architecture).save_pretrained(tmp_path / "model")
    recipe, text = new_recipe(str(tmp_path / "model"), sparsity=0.4, calibration="wikitext2")
    (tmp_path / "mine.yaml").write_text(text)
    assert load(tmp_path / "mine.yaml") == recipe
    assert (recipe.budget.sparsity, recipe.calibration.corpus) == (0.4, "wikitext2")


def test_a_name_with_line_ends_adds_no_keys_to_the_recipe(tmp_path: Path) -> None:
    model = tmp_path / "odd\nseed: 7\u2028\x85name"
    tiny_config("llama-gqa").save_pretrained(model)
    recipe, text = new_recipe(str(model))
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    assert load(tmp_path / "mine.yaml") == recipe
    assert (recipe.model, recipe.seed) == (str(model), load(find("demo")).seed)
    assert "odd\\nseed: 7\\u2028\\x85name with 30%" in text.splitlines()[0]


def test_new_recipe_needs_no_weights(config_only: str) -> None:
    recipe, _ = new_recipe(config_only)
    assert recipe.model == config_only
    assert recipe.budget.sparsity == 0.3


def test_new_recipe_explains_its_values_in_comments(config_only: str) -> None:
    _, text = new_recipe(config_only)
    assert "4 layers of 4 KV heads, 8 query heads and 24 FFN channels" in text
    assert len(text.splitlines()) < 30


def test_windows_are_no_longer_than_the_model_reads(config_only: str) -> None:
    recipe, _ = new_recipe(config_only)
    longest = tiny_config("llama-gqa").max_position_embeddings
    assert max(recipe.scores.seqlen, recipe.calibration.seqlen, *recipe.evaluation.seqlen) <= longest


def test_weights_are_rounded_when_the_search_would_not_fit(config_only: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert new_recipe(config_only)[0].weight_format == "full"
    monkeypatch.setattr(job, "_free_bytes", lambda devices: 1000)
    recipe, text = new_recipe(config_only)
    assert recipe.weight_format == "int8"
    assert "weight_format: int8  # in full it would need" in text


@pytest.mark.parametrize("architecture", EXPERT_ARCHITECTURES)
def test_weights_of_experts_are_never_rounded(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search would be refused for int8, which does not store experts."""
    tiny_config(architecture).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(job, "_free_bytes", lambda devices: 1000)
    recipe, text = new_recipe(str(tmp_path / "model"))
    assert recipe.weight_format == "full"
    assert "weight_format" not in text


def test_overrides_win_over_the_chosen_values(config_only: str) -> None:
    recipe, _ = new_recipe(config_only, overrides=["search.forward_passes=32", "budget.measure=flops"])
    assert (recipe.search.forward_passes, recipe.budget.measure) == (32, "flops")


def test_calibration_file_is_found_from_any_directory(
    config_only: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("words")
    monkeypatch.chdir(tmp_path)
    assert new_recipe(config_only, calibration="text.txt")[0].calibration.corpus == str(tmp_path / "text.txt")


def test_unsupported_model_is_refused_with_the_supported_ones(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with refused("gpt2", "llama", "qwen3"):
        new_recipe(str(tmp_path / "model"))


def test_impossible_sparsity_is_refused(config_only: str) -> None:
    with refused("budget.sparsity", "1.5"):
        new_recipe(config_only, sparsity=1.5)


@pytest.mark.parametrize(
    ("model", "sparsity", "name"),
    [
        ("owner/SmolLM2-135M", 0.3, "SmolLM2-135M-30"),
        ("/data/my-llama", 0.05, "my-llama-05"),
        ("models/small.gguf", 0.5, "small-50"),
    ],
)
def test_run_is_named_after_model_and_sparsity(model: str, sparsity: float, name: str) -> None:
    assert run_name(model, sparsity) == name


def test_search_of_a_model_resumes_with_the_recipe_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What this machine has free may differ at the second call: the values chosen first stay."""
    from pgprune_cli.cli.search import _open

    tiny_model("llama-gqa").save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    recipe, run = _open("model", None, [], 0.4, "demo")
    assert run == Path("runs/model-40")
    run.mkdir(parents=True)
    from pgprune_cli.recipe.reader import dump

    (run / "recipe.yaml").write_text(dump(recipe))
    monkeypatch.setattr(job, "_free_bytes", lambda devices: 1000)
    assert _open("model", None, [], 0.4, "demo") == (replace(recipe, model=str(tmp_path / "model")), run)


def test_search_of_a_model_without_sparsity_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pgprune_cli.cli.search import _open

    tiny_config("llama-gqa").save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    with refused("model", "--sparsity 0.3"):
        _open("model", None, [], None, None)


@pytest.mark.parametrize("sparsity", [float("nan"), float("inf"), 1.0, -0.1])
def test_search_of_a_model_refuses_a_sparsity_that_is_no_fraction(config_only: str, sparsity: float) -> None:
    from pgprune_cli.cli.search import _open

    with refused(f"--sparsity {sparsity:g}: ", "0 <= value < 1"):
        _open(config_only, None, [], sparsity, None)
