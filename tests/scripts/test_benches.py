"""Every benchmark runs, on a tiny model, and prints ratios that are finite and positive."""

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
def _beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHES))


def rows_of(text: str) -> list[dict[str, str]]:
    """Of a Markdown table, which other lines may stand before."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|") and "---" not in line]
    headings, *rows = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(headings, row, strict=True)) for row in rows]


def ran(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str):
    monkeypatch.setattr(sys, "argv", [name, *SMALL, *words])
    importlib.import_module(name).main()
    out = capsys.readouterr().out
    assert out.startswith("tiny, float32, 2 × 16 tokens, cpu")
    return rows_of(out)


@pytest.mark.parametrize(
    ("name", "words", "ratio", "rows"),
    [
        ("shrunk_forward", ["--keep", "0.8", "0.5"], "ratio", 2),
        ("matrix_share", ["--keep", "1", "0.5"], "ratio", 2),
        ("paper_way", ["--keep", "0.5"], "ratio", 1),
        ("eight_bits", ["--keep", "0.5"], "ratio", 2),
        ("search_step", ["--samples", "4"], "outside, ratio", 1),
        ("search_step", ["--samples", "2", "--policy", "units"], "a forward over a dense one", 1),
    ],
)
def test_a_bench_prints_its_ratios(
    name: str,
    words: list[str],
    ratio: str,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = ran(name, monkeypatch, capsys, *words)
    assert len(found) == rows
    for row in found:
        assert 0 < float(row[ratio]) < math.inf
        assert float(row["least"]) <= float(row["greatest"])


def test_both_ways_hear_the_same_losses() -> None:
    """What is timed against each other gives the same result."""
    paper_way, shrunk_forward, subject = map(importlib.import_module, ("paper_way", "shrunk_forward", "subject"))
    from pgprune_cli.forward.masked import Evaluator, summed_loss

    evaluator = Evaluator(subject.random_model("tiny", torch.float32, torch.device("cpu")))
    tokens = torch.randint(1000, (2, 16), generator=torch.Generator().manual_seed(0))
    keeps = [subject.random_mask(evaluator, 0.5, seed) for seed in (0, 1)]
    ours = evaluator.losses(keeps, tokens).tolist()
    assert paper_way.papers_losses(evaluator, keeps, tokens) == pytest.approx(ours, rel=1e-5)
    with shrunk_forward.masked(evaluator, keeps[0]):
        assert float(summed_loss(evaluator.model, tokens)) == pytest.approx(ours[0] * 30, rel=1e-5)
    assert abs(ours[0] - float(summed_loss(evaluator.model, tokens)) / 30) > 1e-6


def test_pairs_are_timed_in_turn_and_the_first_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = importlib.import_module("subject")
    readings = iter(x for taken in (9e9, 9e9, 2e9, 4e9, 3e9, 3e9, 8e9, 4e9) for x in (0, taken))
    monkeypatch.setattr(subject, "synchronised_clock", lambda device: next(readings))
    order: list[str] = []
    ratio = subject.in_turn(lambda: order.append("a"), lambda: order.append("b"), 3, torch.device("cpu"))
    assert order == ["a", "b"] * 4
    assert ratio == (3.0, 4.0, 1.0, 0.5, 2.0)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of the resident memory is Linux's")
@pytest.mark.parametrize("weights", ["dtype", "int8", "fp8"])
def test_the_memory_bench_counts_what_is_allowed(weights: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Of a tiny model the noise of the process outweighs the weights: what the ratio is, a large one says."""
    monkeypatch.setattr(sys, "argv", ["search_memory", *SMALL, "--weights", weights])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module("search_memory").main()
    (row,) = rows_of(capsys.readouterr().out)
    assert 0 < float(row["ratio"]) < math.inf
    assert stopped.value.code == int(float(row["ratio"]) > 1)
    assert int(row["before MB"]) <= int(row["loaded MB"]) <= int(row["peak MB"])
