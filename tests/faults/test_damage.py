"""Damaged, mismatched, outdated or missing files are refused: the message says what is wrong, where, and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers.faults_bench import RECIPE
from helpers.models import save_tokenizer, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pgprune_cli.errors import RunError, UserError
from pgprune_cli.jobs.compare import compare
from pgprune_cli.jobs.evaluate import remember
from pgprune_cli.jobs.export import export
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
    METRICS_FILE,
    RECIPE_FILE,
    REPAIR_FILE,
    SCORES_FILE,
)
from pgprune_cli.storage.records import read_record

WIDTH_SEARCH = ["search.policy=widths", "search.masks_per_step=4", "search.forward_passes=12"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text, and a recipe that uses both."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama-gqa").save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    (folder / "text.txt").write_text("ab" * 400 + "The king was glad. " * 40)
    (folder / "recipe.yaml").write_text(RECIPE.format(base=folder))
    return folder


@pytest.fixture(scope="module")
def finished_run(base, tmp_path_factory, token_cache) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGPRUNE_CACHE", token_cache)
        search(load(base / "recipe.yaml"), run)
    return run


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    """A copy of the finished run, to damage."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@contextmanager
def refused_with(*facts: str, error: type[Exception] = UserError) -> Iterator[None]:
    """Fail unless the body raises `error` with a one-line message that holds every fact.

    The wording is in the snapshots of the modules' own tests; some of it quotes a library or depends on the weights.
    """
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for fact in facts:
        assert fact in message, f"{fact!r} is not in the message: {message}"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = (truncate, flip_a_bit, empty)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [DECISION_RECORD, DECISION_MASKS, REPAIR_FILE])
def test_a_damaged_decision_is_refused_by_search_export_and_eval(base, run, tmp_path, name, damage) -> None:
    damage(run / name)
    for job in (
        lambda: search(load(base / "recipe.yaml"), run),
        lambda: export(run, tmp_path / "small"),
        lambda: open_target(str(run), device="cpu"),
    ):
        with refused_with(f"{run / name}: "):
            job()
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_scores_are_refused_and_can_be_computed_again(base, tmp_path, damage) -> None:
    recipe = load(base / "recipe.yaml")
    init_scores(recipe, tmp_path)
    damage(tmp_path / SCORES_FILE)
    with refused_with(f"{tmp_path / SCORES_FILE}: damaged"):
        search(recipe, tmp_path)
    init_scores(recipe, tmp_path)
    search(recipe, tmp_path)


def test_scores_swapped_between_layers_are_refused(base, tmp_path) -> None:
    recipe = load(base / "recipe.yaml")
    scores = init_scores(recipe, tmp_path)
    intact = (tmp_path / SCORES_FILE).read_bytes()
    first, second = (scores.tensors[f"layers.{index}.ffn"].numpy().tobytes() for index in (0, 1))
    placeholder = bytes(len(first))
    swapped = intact.replace(first, placeholder).replace(second, first).replace(placeholder, second)
    assert swapped != intact and len(swapped) == len(intact)
    (tmp_path / SCORES_FILE).write_bytes(swapped)
    with refused_with(f"{tmp_path / SCORES_FILE}: damaged"):
        search(recipe, tmp_path)


def test_scores_of_a_newer_pgprune_are_refused(base, tmp_path, monkeypatch) -> None:
    recipe = load(base / "recipe.yaml")
    scores = init_scores(recipe, tmp_path)
    monkeypatch.setattr("pgprune_cli.run.scores.VERSION", 2)
    scores.save(tmp_path)
    monkeypatch.undo()
    with refused_with(f"{tmp_path / SCORES_FILE}: ", "version 2"):
        search(recipe, tmp_path)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_evaluation_is_refused_by_export(run, tmp_path, damage) -> None:
    remember(run, {"parameters": 1, "dtype": "float32", "device": "cpu", "perplexity": []})
    damage(run / EVALUATION_FILE)
    with refused_with(f"{run / EVALUATION_FILE}: "):
        export(run, tmp_path / "small")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_measurement_is_refused_by_compare(base, tmp_path, damage) -> None:
    recipe = load(base / "recipe.yaml")
    compare(recipe, tmp_path, only=["metric"], max_windows=2)
    measurement = tmp_path / "dense" / MEASURED_FILE
    damage(measurement)
    with refused_with(f"{measurement}: "):
        compare(recipe, tmp_path, only=["metric"], max_windows=2)


def test_a_decision_of_another_run_is_refused(base, run, tmp_path) -> None:
    search(load(base / "recipe.yaml", ["budget.sparsity=0.2"]), tmp_path / "other")
    for name in (DECISION_MASKS, DECISION_RECORD, REPAIR_FILE):
        shutil.copyfile(tmp_path / "other" / name, run / name)
    with refused_with(f"{run / DECISION_RECORD}: ", RECIPE_FILE):
        search(load(base / "recipe.yaml"), run)


def test_a_recipe_that_is_not_text_is_refused_by_a_search_before_and_after_its_decision(base, run) -> None:
    for content, fault in ((b"\xff", "UTF-8"), (b"model: [", "YAML"), (b"null", "expected keys")):
        (run / RECIPE_FILE).write_bytes(content)
        for dtype in ("fastest", "float32"):
            with refused_with(f"{run / RECIPE_FILE}:", fault):
                search(load(base / "recipe.yaml", [f"dtype={dtype}"]), run)
    (run / DECISION_RECORD).unlink()
    with refused_with(f"{run / RECIPE_FILE}:"):
        search(load(base / "recipe.yaml"), run)


def test_compare_accepts_a_history_whose_last_line_is_half_written(base, tmp_path) -> None:
    """A power cut may have cut off its last line."""
    recipe = load(base / "recipe.yaml")
    compare(recipe, tmp_path, only=["metric-start"], max_windows=2)
    run = tmp_path / "metric-start" / "seed-0"
    for name in (DECISION_RECORD, MEASURED_FILE):
        (run / name).unlink()
    with (run / METRICS_FILE).open("a") as history:
        history.write('{"step": 6, "los')
    compare(recipe, tmp_path, only=["metric-start"], max_windows=2)
    assert (run / DECISION_RECORD).exists()
    assert [json.loads(line)["step"] for line in (run / METRICS_FILE).read_text().splitlines()] == [0, 1, 2, 3, 4, 5]


# --- the base model


@pytest.fixture
def own_base(base, tmp_path) -> Path:
    """A copy of the base model, to damage, and a recipe for it."""
    shutil.copytree(base / "model", tmp_path / "model")
    recipe = (base / "recipe.yaml").read_text().replace(f"{base}/model", f"{tmp_path}/model")
    (tmp_path / "recipe.yaml").write_text(recipe)
    return tmp_path


def set_weight(model: Path, name: str, value: float) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[name][-1, -1] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def scale_weights(model: Path, part_of_name: str, factor: float) -> None:
    tensors = load_file(model / "model.safetensors")
    for name in tensors:
        if part_of_name in name:
            tensors[name] *= factor
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("change", ["weight", "config"])
def test_a_base_model_that_changed_after_the_search_is_refused(own_base, change) -> None:
    recipe, model, run = load(own_base / "recipe.yaml"), own_base / "model", own_base / "run"
    search(recipe, run)
    if change == "weight":
        set_weight(model, "model.layers.1.mlp.up_proj.weight", 0.5)
    else:
        config = (model / "config.json").read_text()
        (model / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    with refused_with(str(model), "searched"):
        export(run, own_base / "small")
    with refused_with(str(model), "searched"):
        open_target(str(run), device="cpu")
    (run / DECISION_RECORD).unlink()
    with refused_with(str(run / SCORES_FILE), "another model"):
        search(recipe, run)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_refused_wherever_a_model_is_read(own_base, value, monkeypatch) -> None:
    monkeypatch.setattr("pgprune_cli.model.loading.CHECKED_AT_ONCE", 100)  # so that it is in the last part
    model, name = own_base / "model", "model.layers.2.mlp.down_proj.weight"
    set_weight(model, name, value)
    recipe = load(own_base / "recipe.yaml", ["scores.metric=uniform"])
    for job in (
        lambda: init_scores(recipe, own_base / "run"),
        lambda: search(recipe, own_base / "run"),
        lambda: open_target(str(model), device="cpu"),
    ):
        with refused_with(f"{model}: {name}", "NaN or infinity"):
            job()
    assert not (own_base / "run").exists()


def test_a_weight_that_exceeds_float16_is_refused_with_the_dtypes_to_use(own_base) -> None:
    model, name = own_base / "model", "model.layers.2.mlp.down_proj.weight"
    set_weight(model, name, 1e6)
    with refused_with(name, "float16", "dtype", "bfloat16", "float32"):
        load_model(resolve(str(model)), "float16", "cpu")
    load_model(resolve(str(model)), "bfloat16", "cpu")


def test_a_missing_shard_is_named(own_base) -> None:
    model = own_base / "model"
    shutil.rmtree(model)
    tiny_model("llama-gqa").save_pretrained(model, max_shard_size="20KB")
    save_tokenizer(model)
    shards = sorted(model.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with refused_with(f"{shards[1]}: missing"):
        init_scores(load(own_base / "recipe.yaml"), own_base / "run")


@pytest.mark.parametrize("damage", [truncate, empty])
def test_a_truncated_weight_file_is_named(own_base, damage) -> None:
    weights = own_base / "model" / "model.safetensors"
    damage(weights)
    with refused_with(f"{weights}: damaged"):
        init_scores(load(own_base / "recipe.yaml"), own_base / "run")


def test_a_model_that_overflows_in_float16_stops_scores_and_search(own_base) -> None:
    """The weights are finite in float16, but the hidden states are not."""
    scale_weights(own_base / "model", "proj", 1e4)
    recipe = load(own_base / "recipe.yaml", ["dtype=float16", "scores.metric=uniform", "repair.method=none"])
    with refused_with("float16", "float32", "bfloat16", error=RunError):
        search(recipe, own_base / "run")
    calibrated = load(own_base / "recipe.yaml", ["dtype=float16", "scores.metric=obs"])
    with refused_with("float32", "bfloat16", error=RunError):
        init_scores(calibrated, own_base / "other")


# --- extreme models


def save_model(folder: Path, **sizes: int) -> None:
    config = tiny_config("llama-gqa")
    for name, value in sizes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    shutil.rmtree(folder)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    save_tokenizer(folder)


@pytest.mark.parametrize("policy", [[], WIDTH_SEARCH], ids=["units", "widths"])
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
def test_the_smallest_models_are_searched_at_both_ends_of_the_budget(own_base, sizes, sparsity, metric, policy) -> None:
    save_model(own_base / "model", **sizes)
    overrides = [f"budget.sparsity={sparsity}", f"scores.metric={metric}", *policy]
    decision = search(load(own_base / "recipe.yaml", overrides), own_base / "run")
    assert decision.sparsity >= sparsity - 1e-6
    if sparsity == 0.0:
        assert decision.sparsity == 0.0
    if decision.sparsity == 1.0:
        with refused_with(f"{DECISION_RECORD}: ", "keeps no units"):
            export(own_base / "run", own_base / "small")
    else:
        export(own_base / "run", own_base / "small")


@pytest.mark.parametrize("policy", [[], WIDTH_SEARCH], ids=["units", "widths"])
@pytest.mark.parametrize("metric", ["obs", "flap", "magnitude"])
@pytest.mark.parametrize("block", ["mlp", "self_attn"])
def test_a_model_whose_blocks_are_all_zero_is_searched_and_exported(own_base, block, metric, policy) -> None:
    scale_weights(own_base / "model", block, 0.0)
    recipe = load(own_base / "recipe.yaml", [f"scores.metric={metric}", *policy])
    decision = search(recipe, own_base / "run")
    assert decision.heldout_loss is not None and 0.35 < decision.sparsity < 0.55
    export(own_base / "run", own_base / "small")


def test_the_same_seed_gives_the_same_bytes_twice(base, finished_run, tmp_path) -> None:
    search(load(base / "recipe.yaml"), tmp_path / "again")
    for name in (DECISION_MASKS, REPAIR_FILE, SCORES_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (finished_run / name).read_bytes()
    again, first = (read_record(run / DECISION_RECORD) for run in (tmp_path / "again", finished_run))
    assert again | {"phases": first["phases"]} == first  # seconds differ
