"""A search that does not fit the free memory is refused before its weights are loaded, or told how it will run."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch
from helpers.messages import refused, says
from helpers.models import save_tokenizer, tiny_model

from pgprune_cli.console.progress import StderrProgress
from pgprune_cli.errors import UserError
from pgprune_cli.jobs import compare as compare_job
from pgprune_cli.jobs import memory
from pgprune_cli.jobs import search as search_job
from pgprune_cli.jobs.compare import compare
from pgprune_cli.jobs.memory import devices_for, need_of
from pgprune_cli.jobs.search import search
from pgprune_cli.search.preparation import Preparation


def test_a_search_beyond_main_memory_is_refused_before_loading(small, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(search_job, "load_prunable", None)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
    with refused("memory: the search needs", "0.0 GB are free", "calibration.seqlen"):
        search(small(), tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.yaml").exists()


@pytest.fixture
def on_gpus(small, monkeypatch):
    """Return a function that gives a preparation on a machine whose GPUs have `free` bytes each."""

    def prepared(*free: int, device: str = "auto") -> Preparation:
        preparation = Preparation(small(f"device={device}"), progress=StderrProgress())
        gpus = [torch.device("cuda", index) for index in range(len(free))]
        preparation.__dict__["devices"] = gpus if device == "auto" else gpus[:1]
        monkeypatch.setattr(memory, "free_bytes", lambda gpu: free[gpu.index])
        return preparation

    return prepared


def test_auto_takes_the_emptiest_gpus_that_hold_a_search(on_gpus) -> None:
    needed = need_of(on_gpus(1))
    whole = needed.weights + needed.beside

    def chosen(*free: int, **device: str) -> list[int]:
        return [gpu.index for gpu in devices_for(on_gpus(*free, **device), needed)]

    assert needed.least < needed.beside
    assert chosen(whole, whole + 1) == [1]
    assert chosen(whole - 1, 5, whole - 1) == [0, 2]  # the weights alone would fit one
    assert chosen(5, whole, device="cuda") == [0]


def test_a_search_that_fits_only_in_parts_says_so_and_one_that_does_not_fit_is_refused(on_gpus, capfd) -> None:
    needed = need_of(on_gpus(1))
    check = memory.SEARCH_CHECKS[-1].find
    says(check(on_gpus(needed.weights + needed.beside)), "needs up to", "on cuda:0, where")
    assert "memory:" not in capfd.readouterr().err
    assert "smaller batches" in check(on_gpus(needed.weights + needed.least))
    says(
        capfd.readouterr().err, "memory: the search needs up to", "smaller batches", "on the CPU", "calibration.seqlen"
    )
    with refused("memory: the search needs", "on cuda:0", "more devices", "weight_format"):
        check(on_gpus(needed.weights + needed.least - 1))
    with refused("memory: the search needs", "on each of cuda:0, cuda:1", "more devices"):
        check(on_gpus(1, 1))


@pytest.mark.parametrize(
    ("architecture", "weight_format", "named"),
    [("llama-gqa", "full", True), ("llama-gqa", "int8", False), ("mixtral", "full", False)],
)
def test_int8_is_advised_only_where_it_would_help(
    architecture, weight_format, named, small, tmp_path, monkeypatch
) -> None:
    tiny_model(architecture).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The old king slept. Mira owned a red kite. " * 20)
    overrides = [f"model={tmp_path / 'model'}", f"calibration.corpus={tmp_path / 'text.txt'}", "scores.metric=wanda-sp"]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(UserError) as error:
        search(small(*overrides, f"weight_format={weight_format}"), tmp_path / "run")
    says(str(error.value), "memory: the search needs", "calibration.seqlen", "smaller model")
    assert ("int8" in str(error.value)) == named


def test_a_comparison_beyond_main_memory_is_refused_before_its_evaluation(small, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(compare_job, "open_target", None)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
    with refused("memory: the search needs", "0.0 GB are free"):
        compare(small(), tmp_path / "table")
