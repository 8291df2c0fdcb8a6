"""Every benchmark runs on a tiny model and prints finite, positive ratios."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

BENCHES = Path(__file__).parents[2] / "scripts" / "bench"
SMALL = ["tiny", "--repeats", "2", "--batch", "2", "--seqlen", "16", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the benchmarks import each other."""
    monkeypatch.syspath_prepend(str(BENCHES))


def rows_of(text: str) -> list[dict[str, str]]:
    """Return the rows of the Markdown table in `text`."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|") and "---" not in line]
    headings, *rows = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(headings, row, strict=True)) for row in rows]


def rows_printed(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str):
    monkeypatch.setattr(sys, "argv", [name, *SMALL, *words])
    importlib.import_module(name).main()
    out = capsys.readouterr().out
    assert out.startswith("tiny, float32, 2 × 16 tokens, cpu")
    return rows_of(out)


@pytest.mark.parametrize(
    ("name", "words", "ratio", "row_count"),
    [
        ("shrunk_forward", ["--keep", "0.8", "0.5"], "ratio", 2),
        ("matmul_share", ["--keep", "1", "0.5"], "ratio", 2),
        ("paper_way", ["--keep", "0.5"], "ratio", 1),
        ("weight_formats", ["--keep", "0.5"], "ratio", 2),
        ("freed_memory", ["--keep", "0.5"], "ratio", 1),
        ("search_step", ["--masks-per-step", "4"], "share outside", 1),
        ("search_step", ["--masks-per-step", "2", "--policy", "units"], "forward pass over dense", 1),
    ],
)
def test_benchmark_prints_its_ratios(
    name: str,
    words: list[str],
    ratio: str,
    row_count: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = rows_printed(name, monkeypatch, capsys, *words)
    assert len(rows) == row_count
    for row in rows:
        assert 0 < float(row[ratio]) < math.inf
        assert float(row["least"]) <= float(row["greatest"])


def test_timed_alternatives_compute_the_same_losses() -> None:
    paper_way, shrunk_forward, subject = map(importlib.import_module, ("paper_way", "shrunk_forward", "subject"))
    from pgprune_cli.forward.masked import Evaluator, summed_loss
    from pgprune_cli.model.prunable import PrunableModel

    model = PrunableModel.of(subject.random_model("tiny", torch.float32, torch.device("cpu")))
    evaluator = Evaluator(model)
    tokens = torch.randint(1000, (2, 16), generator=torch.Generator().manual_seed(0))
    model_masks = [subject.random_mask(evaluator, 0.5, seed) for seed in (0, 1)]
    losses = evaluator.losses(model_masks, tokens).tolist()
    assert paper_way.paper_losses(evaluator, model_masks, tokens) == pytest.approx(losses, rel=1e-5)
    with evaluator.in_order(shrunk_forward.in_mask_order(model_masks[0])):
        assert evaluator.losses(model_masks[:1], tokens).tolist() == pytest.approx(losses[:1], rel=1e-6)
    with shrunk_forward.masked(evaluator, model_masks[0]):
        assert float(summed_loss(model.module, tokens)) == pytest.approx(losses[0] * 30, rel=1e-5)
    assert abs(losses[0] - float(summed_loss(model.module, tokens)) / 30) > 1e-6


def test_in_turn_alternates_and_drops_the_first_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = importlib.import_module("subject")
    readings = iter(x for nanoseconds in (9e9, 9e9, 2e9, 4e9, 3e9, 3e9, 8e9, 4e9) for x in (0, nanoseconds))
    monkeypatch.setattr(subject, "synchronised_clock", lambda device: next(readings))
    order: list[str] = []
    ratio = subject.in_turn(lambda: order.append("a"), lambda: order.append("b"), 3, torch.device("cpu"))
    assert order == ["a", "b"] * 4
    assert ratio == (3.0, 4.0, 1.0, 0.5, 2.0)


SMALL_GPU = [
    "calibration.windows=32",
    "calibration.seqlen=16",
    "calibration.heldout=8",
    "scores.windows=4",
    "scores.seqlen=32",
    "search.forward_passes=32",
    "repair.windows=8",
    "recover.seqlen=16",
    "recover.accumulate=1",
    "recover.batch=2",
]


def gpu_table(words: list[str], settings: list[str], path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, bool]:
    """Run the benchmark on a CPU, and return what it wrote and whether it failed."""
    words = [*words, "--device", "cpu", "--layers", "2", "--hidden", "64", "--out", str(path)]
    monkeypatch.setattr("pgprune_cli.jobs.estimate.matmul_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr(sys, "argv", ["gpu", *words, *(word for setting in settings for word in ("--set", setting))])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module("gpu").main()
    return path.read_text(), bool(stopped.value.code)


def test_the_gpu_benchmark_writes_its_table_without_a_gpu(tmp_path, monkeypatch) -> None:
    """All phases and a recovery. There are no peaks, because the CPU does not count them."""
    text, failed = gpu_table(["llama3-8b"], SMALL_GPU, tmp_path / "table.md", monkeypatch)
    assert not failed, text
    assert f"torch {torch.__version__}" in text
    rows = {row.pop(""): list(row.values()) for row in rows_of(text)}
    for phase in ("scores", "width table", "steps", "repair"):
        measured, scaled = map(float, rows[f"{phase}, minutes"])
        assert 2 * measured < scaled < 20 * measured
    speeds = [float(cell.replace(",", "")) for cell in rows["recovery, tokens/s"]]
    assert speeds[0] > speeds[1] > 0
    assert all(float(cell) > 0 for cell in rows["GB, search, estimate"])
    assert rows["GB, search"] == ["–", "–"]


def test_the_gpu_benchmark_says_what_failed(tmp_path, monkeypatch) -> None:
    settings = [*SMALL_GPU, "calibration.seqlen=4096", "calibration.windows=4"]
    text, failed = gpu_table([], settings, tmp_path / "table.md", monkeypatch)
    assert failed
    assert [name for name in ("llama-7b", "llama3-8b") if f"{name} failed: calibration.seqlen" in text] == [
        "llama-7b",
        "llama3-8b",
    ]


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peak resident memory is read from /proc, which only Linux has"
)
@pytest.mark.parametrize("weight_format", ["full", "int8", "fp8"])
def test_search_memory_exits_with_1_when_the_limit_is_exceeded(
    weight_format: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The ratio itself is not asserted: in a tiny model, the noise of the process outweighs the weights."""
    monkeypatch.setattr(sys, "argv", ["search_memory", *SMALL, "--weight-format", weight_format])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module("search_memory").main()
    (row,) = rows_of(capsys.readouterr().out)
    assert 0 < float(row["ratio"]) < math.inf
    assert stopped.value.code == int(float(row["ratio"]) > 1)
    assert int(row["before MB"]) <= int(row["loaded MB"]) <= int(row["peak MB"])
