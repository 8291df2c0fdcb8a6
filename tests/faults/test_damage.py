"""Files that are damaged, another's, of another time or gone: refused with what happened, which file and what to do."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.faults_bench import RECIPE
from helpers.models import save_tokenizer, tiny_model
from safetensors.torch import load_file, save_file

from pgprune_cli.errors import RunError, UserError
from pgprune_cli.jobs import export as export_job
from pgprune_cli.jobs.compare import compare
from pgprune_cli.jobs.evaluate import remember
from pgprune_cli.jobs.init_scores import init_scores
from pgprune_cli.jobs.search import search
from pgprune_cli.jobs.targets import open_target
from pgprune_cli.model.loading import load_model
from pgprune_cli.model.source import resolve
from pgprune_cli.recipe.reader import load
from pgprune_cli.run.layout import (
    DECISION_MASKS,
    DECISION_RECORD,
    EVALUATION_FILE,
    MEASURED_FILE,
    RECIPE_FILE,
    REPAIR_FILE,
    SCORES_FILE,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its text and recipe."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama-gqa").save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    (folder / "text.txt").write_text("ab" * 400 + "The king was glad. " * 40)
    (folder / "recipe.yaml").write_text(RECIPE.format(base=folder))
    return folder


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory, token_cache) -> Path:
    """A run that is done."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGPRUNE_CACHE", token_cache)
        search(load(base / "recipe.yaml"), folder)
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """One to damage."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def said(act, *arguments, kind=UserError, **options) -> str:
    with pytest.raises(kind) as error:
        act(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


HARMS = (truncated, flipped, emptied)


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", [DECISION_RECORD, DECISION_MASKS, REPAIR_FILE])
def test_a_damaged_decision_is_refused_by_all_who_read_it(base, run, tmp_path, name, harm) -> None:
    harm(run / name)
    for act in (
        lambda: search(load(base / "recipe.yaml"), run, True),
        lambda: export_job.export(run, tmp_path / "small"),
        lambda: open_target(str(run), device="cpu", uses_recipe=True),
    ):
        assert said(act).startswith(f"{run / name}: ")
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("harm", HARMS)
def test_damaged_scores_are_refused(base, tmp_path, harm) -> None:
    recipe = load(base / "recipe.yaml")
    init_scores(recipe, tmp_path)
    harm(tmp_path / SCORES_FILE)
    assert said(search, recipe, tmp_path, True).startswith(f"{tmp_path / SCORES_FILE}: damaged")
    init_scores(recipe, tmp_path)
    search(recipe, tmp_path)


def test_swapped_scores_and_those_of_a_newer_pgprune_are_refused(base, tmp_path, monkeypatch) -> None:
    recipe = load(base / "recipe.yaml")
    scores = init_scores(recipe, tmp_path)
    sound = (tmp_path / SCORES_FILE).read_bytes()
    first, second = (scores.tensors[f"layers.{index}.ffn"].numpy().tobytes() for index in (0, 1))
    between = bytes(len(first))
    swapped = sound.replace(first, between).replace(second, first).replace(between, second)
    assert swapped != sound and len(swapped) == len(sound)
    (tmp_path / SCORES_FILE).write_bytes(swapped)
    assert said(search, recipe, tmp_path, True).startswith(f"{tmp_path / SCORES_FILE}: damaged: not what was written")
    monkeypatch.setattr("pgprune_cli.run.scores.VERSION", 2)
    scores.save(tmp_path)
    monkeypatch.undo()
    assert said(search, recipe, tmp_path, True) == (
        f"{tmp_path / SCORES_FILE}: of a newer pgprune (version 2, this one reads 1); upgrade pgprune"
    )
    (tmp_path / SCORES_FILE).write_bytes(sound)
    search(recipe, tmp_path)


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_evaluation_is_refused(run, tmp_path, harm) -> None:
    target = open_target(str(run), device="cpu")
    remember(target, {"parameters": 1, "dtype": "float32", "device": "cpu", "perplexity": []})
    harm(run / EVALUATION_FILE)
    assert said(export_job.export, run, tmp_path / "small").startswith(f"{run / EVALUATION_FILE}: ")


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_measurement_of_a_comparison_is_refused(base, tmp_path, harm) -> None:
    recipe = load(base / "recipe.yaml")
    compare(recipe, tmp_path, only=["metric"], max_windows=2)
    harm(tmp_path / "dense" / MEASURED_FILE)
    assert said(compare, recipe, tmp_path, only=["metric"], max_windows=2).startswith(
        f"{tmp_path / 'dense' / MEASURED_FILE}: "
    )


def test_a_decision_of_another_run_is_refused(base, run, tmp_path) -> None:
    other = load(base / "recipe.yaml", ["budget.sparsity=0.2"])
    search(other, tmp_path / "other")
    for name in (DECISION_MASKS, DECISION_RECORD, REPAIR_FILE):
        shutil.copyfile(tmp_path / "other" / name, run / name)
    assert said(search, load(base / "recipe.yaml"), run, True) == (
        f"{run / DECISION_RECORD}: of another run than {RECIPE_FILE} beside it; put this run's own back"
    )


def test_a_half_written_last_line_of_the_history_is_no_damage(base, tmp_path) -> None:
    """A comparison reads how long a stopped search took; a power cut may have cut its last line."""
    recipe = load(base / "recipe.yaml")
    compare(recipe, tmp_path, only=["metric-start"], max_windows=2)
    run = tmp_path / "metric-start" / "seed-0"
    for name in (DECISION_RECORD, MEASURED_FILE):
        (run / name).unlink()
    with (run / "metrics.jsonl").open("a") as history:
        history.write('{"step": 6, "los')
    compare(recipe, tmp_path, only=["metric-start"], max_windows=2)


# --- the base model


@pytest.fixture
def moved(base, tmp_path) -> Path:
    """The base, to be damaged, and a recipe for it."""
    shutil.copytree(base / "model", tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(
        (base / "recipe.yaml").read_text().replace(f"{base}/model", f"{tmp_path}/model")
    )
    return tmp_path


def set_weight(model: Path, name: str, value: float) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[name][0, 0] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("change", ["weight", "config"])
def test_a_base_that_changed_since_the_decision_is_refused(moved, change) -> None:
    recipe = load(moved / "recipe.yaml")
    search(recipe, moved / "run")
    if change == "weight":
        set_weight(moved / "model", "model.layers.1.mlp.up_proj.weight", 0.5)
    else:
        config = moved / "model" / "config.json"
        config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    for act in (
        lambda: export_job.export(moved / "run", moved / "small"),
        lambda: open_target(str(moved / "run"), device="cpu", uses_recipe=True),
    ):
        assert "not the model that was searched" in said(act)
    (moved / "run" / DECISION_RECORD).unlink()
    assert "scores of another model than" in said(search, recipe, moved / "run", True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused_wherever_a_model_is_read(moved, value) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    set_weight(moved / "model", name, value)
    words = f"{moved}/model: {name} holds NaN or infinity: fetch the model's files again"
    recipe = load(moved / "recipe.yaml", ["scores.metric=uniform"])
    assert said(init_scores, recipe, moved / "run", True) == words
    assert said(search, recipe, moved / "run", True) == words
    assert said(partial(open_target, device="cpu", uses_recipe=True), f"{moved}/model") == words
    assert not (moved / "run").exists()


def test_more_than_float16_holds_is_no_damage_and_says_so(moved) -> None:
    set_weight(moved / "model", "model.layers.2.mlp.down_proj.weight", 1e6)
    assert said(load_model, resolve(f"{moved}/model"), "float16", "cpu").endswith(
        "; or it has more than float16 holds: set dtype to bfloat16 or float32"
    )
    load_model(resolve(f"{moved}/model"), "bfloat16", "cpu")


def test_a_missing_shard_is_named(moved) -> None:
    model = tiny_model("llama-gqa")
    shutil.rmtree(moved / "model")
    model.save_pretrained(moved / "model", max_shard_size="20KB")
    save_tokenizer(moved / "model")
    shards = sorted((moved / "model").glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    words = f"{shards[1]}: missing. Fetch the model's files again."
    assert said(init_scores, load(moved / "recipe.yaml"), moved / "run", True) == words


@pytest.mark.parametrize("harm", [truncated, emptied])
def test_a_cut_shard_is_named(moved, harm) -> None:
    harm(moved / "model" / "model.safetensors")
    words = said(init_scores, load(moved / "recipe.yaml"), moved / "run", True)
    assert words.startswith(f"{moved}/model/model.safetensors: damaged or not safetensors (")


def test_a_search_whose_model_overflows_says_so(moved) -> None:
    """In float16 the weights are finite and what they make is not."""
    tensors = load_file(moved / "model" / "model.safetensors")
    for name in tensors:
        if "proj" in name:
            tensors[name] *= 1e4
    save_file(tensors, moved / "model" / "model.safetensors", metadata={"format": "pt"})
    recipe = load(moved / "recipe.yaml", ["dtype=float16", "scores.metric=uniform", "repair.method=none"])
    assert "overflows in float16: try dtype float32 or bfloat16" in said(
        search, recipe, moved / "run", True, kind=RunError
    )
    calibrated = load(moved / "recipe.yaml", ["dtype=float16", "scores.metric=obs"])
    assert "try dtype float32 or bfloat16" in said(init_scores, calibrated, moved / "other", True, kind=RunError)


# --- extremes of a model


def save_model(folder: Path, **sizes: int) -> None:
    from helpers.models import tiny_config
    from transformers import AutoModelForCausalLM

    config = tiny_config("llama-gqa")
    for name, value in sizes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    shutil.rmtree(folder)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    save_tokenizer(folder)


LAYERS = ["search.policy=widths", "search.masks_per_step=4", "search.forward_passes=12"]


@pytest.mark.parametrize("policy", [[], LAYERS], ids=["units", "widths"])
@pytest.mark.parametrize("metric", ["obs", "wanda-sp"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.999999])
@pytest.mark.parametrize(
    "sizes",
    [
        {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1},
        {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 1},
    ],
    ids=["one layer, one head", "one unit of each"],
)
def test_the_least_models_and_the_ends_of_the_budget(moved, sizes, sparsity, metric, policy) -> None:
    save_model(moved / "model", **sizes)
    recipe = load(moved / "recipe.yaml", [f"budget.sparsity={sparsity}", f"scores.metric={metric}", *policy])
    decision = search(recipe, moved / "run")
    assert decision.sparsity >= sparsity - 1e-6
    if sparsity == 0.0:
        assert decision.sparsity == 0.0
    if decision.sparsity == 1.0:
        assert "nothing" in said(export_job.export, moved / "run", moved / "small")
    else:
        export_job.export(moved / "run", moved / "small")


@pytest.mark.parametrize("policy", [[], LAYERS], ids=["units", "widths"])
@pytest.mark.parametrize("metric", ["obs", "flap", "magnitude"])
@pytest.mark.parametrize("family", ["mlp", "self_attn"])
def test_a_family_of_zeros_is_searched_all_the_same(moved, family, metric, policy) -> None:
    tensors = load_file(moved / "model" / "model.safetensors")
    for name in tensors:
        if family in name:
            tensors[name].zero_()
    save_file(tensors, moved / "model" / "model.safetensors", metadata={"format": "pt"})
    decision = search(load(moved / "recipe.yaml", [f"scores.metric={metric}", *policy]), moved / "run")
    assert decision.heldout_loss is not None and 0.35 < decision.sparsity < 0.55
    export_job.export(moved / "run", moved / "small")


def test_the_same_seed_gives_the_same_bytes_twice(base, finished, tmp_path) -> None:
    search(load(base / "recipe.yaml"), tmp_path / "again")
    for name in (DECISION_MASKS, REPAIR_FILE, DECISION_RECORD, SCORES_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes()
    assert json.loads((tmp_path / "again" / DECISION_RECORD).read_text())["masks_sha256"]
