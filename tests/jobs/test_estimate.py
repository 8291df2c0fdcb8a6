"""What `search --dry-run` says: the counts of a search that runs, and nothing loaded for them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.messages import refused
from helpers.models import save_tokenizer, tiny_model

from pgprune_cli.cli.tables import _placement
from pgprune_cli.errors import UserError
from pgprune_cli.estimate.machines import GPUS
from pgprune_cli.jobs import estimate as job
from pgprune_cli.jobs.estimate import estimate, estimate_recovery
from pgprune_cli.jobs.export import export
from pgprune_cli.jobs.search import search
from pgprune_cli.model.loading import load_model
from pgprune_cli.model.source import DEMO_MODEL, resolve
from pgprune_cli.recipe.reader import find, load
from pgprune_cli.recipe.schema import Recipe


@pytest.fixture(autouse=True)
def _a_rate_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "matmul_rate", lambda device, dtype: {torch.float32: 1e9}.get(dtype, 2e9))
    monkeypatch.setattr(job, "memory_rate", lambda device: 1e9)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("scores.metric=magnitude", "search.forward_passes=7"),
        ("search.policy=widths", "search.masks_per_step=4", "repair.method=least-squares", "repair.windows=9"),
        ("search.policy=widths", "search.masks_per_step=4", "repair.method=sublayer", "repair.sampled_windows=40"),
        ("repair.method=least-squares", "repair.windows=9", "repair.sampled_windows=40"),
        ("repair.method=none", "repair.sampled_windows=8"),
    ],
)
def test_a_search_takes_as_many_forward_passes_as_were_said(overrides: tuple[str, ...], small, tmp_path: Path) -> None:
    recipe = small(*overrides)
    said = estimate(recipe)["forward_passes"]
    decision = search(recipe, tmp_path / "run")
    assert said == {
        "search": decision.forward_passes,
        "calibration": decision.calibration_forward_passes,
        "tokens": recipe.calibration.batch * recipe.calibration.seqlen,
    }


def test_no_weights_are_needed(small, tmp_path: Path) -> None:
    shutil.copy(DEMO_MODEL / "config.json", tmp_path)
    ours, demo = (estimate(small(f"model={name}")) for name in (tmp_path, "demo"))
    assert ours == demo | {"model": str(tmp_path)}
    real = load_model(resolve("demo"), "float32", "cpu")
    assert demo["parameters"] == sum(parameter.numel() for parameter in real.parameters())
    assert demo["memory"]["weights"] == 4 * demo["parameters"]
    assert estimate(small("dtype=bfloat16"))["memory"]["weights"] == 2 * demo["parameters"]
    assert estimate(small("dtype=auto")) == demo


def test_time_is_the_work_of_all_phases_at_the_rates_measured(small, tmp_path: Path) -> None:
    said = estimate(small("dtype=bfloat16"))
    assert said["flops_per_second"] == {"bfloat16": 2e9, "float32": 1e9}
    assert said["seconds"] == sum(phase["seconds"] for phase in said["phases"].values())
    assert list(said["phases"]) == ["opening", *said["flops"]]
    for name, part in said["flops"].items():
        products = sum(count / (1e9 if dtype == "float32" else 2e9) for dtype, count in part.items())
        phase = said["phases"][name]
        assert phase["products"] == pytest.approx(products)
        assert phase["seconds"] >= products
        assert phase["bound"] in ("products", "memory", "host")
        assert phase["pcie"] == 0  # host and device are the same


def test_the_phases_are_those_that_a_search_reports(small, tmp_path: Path) -> None:
    recipe = small("search.policy=widths", "search.masks_per_step=4", "repair.method=least-squares", "repair.windows=9")
    assert list(estimate(recipe)["phases"]) == list(search(recipe, tmp_path / "run").phases)


SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    """Return a function that gives the recipe of LLaMA-7B, of which there is only a config."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("large")
    LlamaConfig(**SHAPE, max_position_embeddings=2048).save_pretrained(folder)
    return lambda *overrides: load(find("llama-7b-50"), [f"model={folder}", *overrides])


def test_a_gpu_that_is_not_here_needs_only_the_config(large, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "matmul_rate", None)
    h100, old = estimate(large("dtype=fastest"), on="h100-80gb"), estimate(large(), on="rtx-3090")
    assert (h100["device"], h100["dtype"]) == ("h100-80gb", "bfloat16")
    assert h100["placement"] == {"gpus": 1, "processes": 1, "fits": "whole", "advice": ""}
    assert h100["seconds"] < old["seconds"] / 3
    assert 30 < h100["seconds"] < 600
    with refused("--on", "h1000"):
        estimate(large(), on="h1000")


def test_only_hidden_states_that_a_device_has_room_for_leave_main_memory(large) -> None:
    ours, other = (estimate(large("repair.windows=8000"), on=on)["memory"] for on in ("h200-141gb", "rtx-4090"))
    assert (ours["hidden_states_on_device"], other["hidden_states_on_device"]) == (True, False)
    assert other["host"] - ours["host"] == other["hidden_states"]
    assert ours["host"] == ours["dense_states"] + max(ours["written_widths"], ours["repaired_weights"]) > 0


def test_several_gpus_share_the_masks_and_the_equations(large) -> None:
    one, eight = (estimate(large(), on="h100-80gb", gpus=gpus) for gpus in (1, 8))
    assert eight["placement"] == {"gpus": 1, "processes": 8, "fits": "whole", "advice": ""}
    assert eight["phases"]["steps"]["seconds"] < one["phases"]["steps"]["seconds"] / 4
    assert eight["phases"]["scores"]["seconds"] < one["phases"]["scores"]["seconds"]


def test_a_search_that_does_not_fit_is_told_what_helps(large, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {}
    for gibibytes in (24, 14, 10, 6):
        monkeypatch.setitem(GPUS, "some", GPUS["rtx-4090"]._replace(gibibytes=gibibytes))
        rows[gibibytes] = estimate(large(), on="some")["placement"]
    assert [row["fits"] for row in rows.values()][0::3] == ["whole", "no"]
    assert "int8" in rows[14]["advice"]
    assert "GPUs" in rows[10]["advice"]
    texts = [dict(_placement({"device": "some", "placement": row}))["fits"] for row in (rows[24], rows[6])]
    assert texts[0] == "yes"
    assert f". {rows[6]['advice']}" in texts[1]


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ('{"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1}', "model type 'gpt2' is not supported"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "its config cannot be used"),
        ("{}", "its config cannot be used"),
    ],
)
def test_a_model_that_cannot_be_pruned_is_refused(config: str, fault: str, small, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=fault):
        estimate(small(f"model={tmp_path}"))


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the demo model."""
    out = tmp_path_factory.mktemp("exported") / "model"
    export(finished["widths"], out)
    return out


def test_a_recovery_is_estimated_from_the_configs_of_both_models(exported: Path, small, tmp_path: Path) -> None:
    for name in ("config.json", "decision.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(exported / name, tmp_path)
    recipe = small("recover.tokens=3000", "recover.batch=2", "recover.seqlen=32", "device=cpu")
    said = estimate_recovery(str(tmp_path), recipe)
    assert (said["teacher"], said["steps"], said["tokens"]) == ("demo", 47, 47 * 64)
    assert said["trained_parameters"] < said["parameters"] < estimate(recipe)["parameters"]
    assert said["memory"]["device"] > 12 * said["trained_parameters"]
    everything = estimate_recovery(str(tmp_path), replace(recipe, recover=replace(recipe.recover, train="all")))
    assert everything["trained_parameters"] == everything["parameters"]
    assert everything["memory"]["device"] > 12 * said["parameters"]
    cached = estimate_recovery(
        str(tmp_path), replace(recipe, recover=replace(recipe.recover, teacher="cached", top_k=8))
    )
    assert cached["memory"]["teacher"] == 0 < cached["disk"]["cache"]


def test_a_recovery_with_windows_beyond_the_context_is_refused(exported: Path, small) -> None:
    with refused("recover.seqlen", "4096"):
        estimate_recovery(str(exported), small("recover.seqlen=4096", "recover.batch=1"))


def test_a_recovery_that_would_be_refused_is_not_estimated(exported: Path, small, tmp_path: Path) -> None:
    other = tiny_model("llama-gqa")
    other.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with refused(str(tmp_path), "vocabulary", "--teacher"):
        estimate_recovery(str(exported), small(), str(tmp_path))
    with refused("cuda:1", "CUDA_VISIBLE_DEVICES=1"):
        estimate_recovery(str(exported), small("device=cuda:1"))


def test_a_teacher_on_other_gpus_takes_nothing_of_the_one_that_trains(exported: Path, small, monkeypatch) -> None:
    alone = estimate_recovery(str(exported), small())["memory"]
    monkeypatch.setattr("pgprune_cli.jobs.estimate.devices_of", lambda device: [torch.device("cpu")] * 2)
    apart = estimate_recovery(str(exported), small())["memory"]
    assert alone["teacher"] > apart["teacher"] == 0
    assert alone["device"] - apart["device"] == alone["teacher"]
