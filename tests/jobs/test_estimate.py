"""What `search --dry-run` says: the counts of a search that runs, and nothing loaded for them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.messages import refused

from pgprune_cli.errors import UserError
from pgprune_cli.jobs import estimate as job
from pgprune_cli.jobs.estimate import estimate, estimate_recovery
from pgprune_cli.jobs.export import export
from pgprune_cli.jobs.search import search
from pgprune_cli.model.loading import load_model
from pgprune_cli.model.source import DEMO_MODEL, resolve


@pytest.fixture(autouse=True)
def _a_rate_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "matmul_rate", lambda device, dtype: {torch.float32: 1e9}.get(dtype, 2e9))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("scores.metric=magnitude", "search.forward_passes=7"),
        ("search.policy=widths", "search.masks_per_step=4", "repair.method=least-squares", "repair.windows=9"),
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


def test_time_is_flops_at_the_rates_measured(small) -> None:
    said = estimate(small("dtype=bfloat16"))
    by_dtype = [pair for part in said["flops"].values() for pair in part.items()]
    assert said["seconds"] == pytest.approx(sum(n / (1e9 if dtype == "float32" else 2e9) for dtype, n in by_dtype))
    assert said["flops_per_second"] == {"bfloat16": 2e9, "float32": 1e9}


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
    for name in ("config.json", "decision.json"):
        shutil.copy(exported / name, tmp_path)
    recipe = small("recover.tokens=3000", "recover.batch=2", "recover.seqlen=32", "device=cpu")
    said = estimate_recovery(str(tmp_path), recipe)
    assert (said["teacher"], said["steps"], said["tokens"]) == ("demo", 47, 47 * 64)
    assert said["parameters"] == said["trained_parameters"] < estimate(recipe)["parameters"]
    assert said["memory"]["device"] > 12 * said["parameters"]
    cached = estimate_recovery(
        str(tmp_path), replace(recipe, recover=replace(recipe.recover, teacher="cached", top_k=8))
    )
    assert cached["memory"]["teacher"] == 0 < cached["disk"]["cache"]


def test_a_recovery_with_windows_beyond_the_context_is_refused(exported: Path, small) -> None:
    with refused("recover.seqlen", "4096"):
        estimate_recovery(str(exported), small("recover.seqlen=4096", "recover.batch=1"))
