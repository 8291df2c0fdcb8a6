"""scripts/make_recipes.py: the shipped recipes follow from its table, and no other recipe ships."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.scripts import script_module

from pgprune_cli.errors import UserError
from pgprune_cli.model.families import family_of
from pgprune_cli.model.families.wrapper import WRAPPERS
from pgprune_cli.recipe.reader import find, load, name_of, shipped, shipped_folder, summary

make_recipes = script_module("make_recipes")


def model_named(name: str):
    return next(model for model in make_recipes.MODELS if model.name == name)


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the script write into a temporary folder, and write every file once."""
    monkeypatch.setattr(make_recipes, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(make_recipes, "PAGE", tmp_path / "recipes.md")
    monkeypatch.syspath_prepend(make_recipes.ROOT / "scripts")
    (tmp_path / "configs" / "paper").mkdir(parents=True)
    run(monkeypatch)
    run(monkeypatch, "--check")
    return tmp_path / "configs"


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr("sys.argv", ["make_recipes.py", *options])
    make_recipes.main()


def test_table_gives_every_shipped_recipe() -> None:
    names = {name_of(path) for path, _ in make_recipes.recipes() if not path.name.startswith("_")}
    assert {name_of(path) for path in shipped()} == names | {"demo"}
    assert {path.relative_to(shipped_folder()).as_posix() for path in shipped_folder().rglob("_*.yaml")} == {
        "_base.yaml",
        "paper/_reference.yaml",
        *(f"_{model.name}.yaml" for model in make_recipes.MODELS),
    }
    assert make_recipes.extra_files(dict(make_recipes.recipes())) == []


def test_written_files_match_the_table() -> None:
    for path, text in (*make_recipes.recipes(), (make_recipes.PAGE, make_recipes.page())):
        assert path.read_text(encoding="utf-8") == text


def test_minutes_are_promised_for_large_dense_models_alone() -> None:
    for model in make_recipes.MODELS:
        dense = model.family not in ("mixtral", "qwen3_moe", "gpt_oss")
        assert ("by estimate" in make_recipes.base(model)) == (dense and model.parameters >= 6000)


def test_check_fails_on_a_stale_a_missing_and_an_extra_recipe(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, text in [("llama2-7b-20.yaml", "stale"), ("_qwen3-4b.yaml", None), ("paper/mine-20.yaml", "extra")]:
        before = (copied / path).read_text() if (copied / path).exists() else None
        (copied / path).unlink(missing_ok=True) if text is None else (copied / path).write_text(text)
        with pytest.raises(SystemExit, match=re.escape(path)):
            run(monkeypatch, "--check")
        (copied / path).unlink(missing_ok=True) if before is None else (copied / path).write_text(before)
    run(monkeypatch, "--check")


def test_models_of_the_table_are_distinct() -> None:
    for field in ("name", "title", "hub"):
        values = [getattr(model, field).lower() for model in make_recipes.MODELS]
        assert len(set(values)) == len(values), field


@pytest.mark.parametrize("model", make_recipes.MODELS, ids=lambda model: model.name)
def test_recipe_differs_from_the_base_only_in_what_the_table_says(model) -> None:
    expected = load(find("demo").parent / "_base.yaml", [f"model={model.reads}", "budget.sparsity=0.5"])
    loaded = load(find(f"{model.name}-50"))
    own = {setting.key.partition(".")[0] for setting in model.settings}
    if model.parameters < 2000:  # there is memory for a fit of several layers
        own |= {"repair"}
        assert loaded.repair.last_layers == -(-model.layers // 4) > expected.repair.last_layers
    if model.parameters >= 2000:  # all weights of it are not trained in the memory of one GPU
        own |= {"recover"}
        assert (loaded.recover.train, loaded.recover.teacher, loaded.recover.top_k) == ("lora", "cached", 64)
    if model.parameters >= 6000:  # a large GPU affords it
        own |= {"search", "repair"}
        assert loaded.search.forward_passes == 5120 > 10 * expected.search.forward_passes
        assert expected.repair.windows < 1536 <= loaded.repair.windows <= loaded.calibration.windows
    if model.parameters > 500:
        different = {name for name in vars(loaded) if getattr(loaded, name) != getattr(expected, name)}
        assert different == own
    assert (loaded.device, loaded.calibration.corpus) == ("auto", "c4")


@pytest.mark.parametrize("model", make_recipes.MODELS, ids=lambda model: model.name)
def test_recipe_says_if_its_model_is_gated(model) -> None:
    gated = model.hub.startswith(("meta-llama/", "google/"))
    for name in (f"{model.name}-20", f"{model.name}-50", *([f"paper/{model.name}-30"] if model.paper else [])):
        text = find(name).read_text(encoding="utf-8")
        assert bool(model.access) == (f"https://huggingface.co/{model.hub}" in text)
        assert ("is gated" in text) == gated


def test_only_olmo_keeps_all_heads() -> None:
    families = {model.name: load(find(f"{model.name}-30")).units.families for model in make_recipes.MODELS}
    assert {name for name, kept in families.items() if kept == ("ffn",)} == {"olmo-2-1b", "olmo-2-7b"}
    assert set(families.values()) == {("ffn",), ("attention", "ffn")}


def test_summary_of_a_base_names_model_and_size() -> None:
    assert (
        summary(shipped_folder() / "_qwen3-0.6b.yaml") == "Qwen3-0.6B (Qwen/Qwen3-0.6B-Base), 596 million parameters."
    )
    assert "6.7 billion" in summary(shipped_folder() / "_llama2-7b.yaml")


def test_model_types_of_the_table_are_supported() -> None:
    for model in make_recipes.MODELS:
        if model.family not in WRAPPERS:  # of these the decoder is pruned, which has a type of its own
            family_of(model.family)
    with pytest.raises(UserError, match="not supported"):
        family_of("not-a-family")


def test_llama_3_keeps_its_learning_rate_of_the_paper() -> None:
    assert load(find("paper/llama3-8b-50")).search.learning_rate == 6e-3
    assert load(find("paper/llama2-7b-50")).search.learning_rate == 2e-3
    assert model_named("llama-3.2-1b").paper is None
