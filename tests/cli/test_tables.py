"""Tables on a terminal and in a pipe, and NO_COLOR."""

from __future__ import annotations

import re

import pytest

from pgprune_cli.cli.tables import grid, print_measured
from pgprune_cli.console.progress import StderrProgress
from pgprune_cli.run.history import Row
from pgprune_cli.search.progress import SearchProgress

LONG = "layers.0.self_attn." + "q" * 300
COLOUR = re.compile(r"\x1b\[[0-9;]*\b(3[0-8]|9[0-7])\b")


def test_grid_never_folds_rows_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    grid(("tensor", "file", "MB"), [[LONG, "model.safetensors", "1.5"], ["b", "c", "10"]])
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.split() == ["tensor", "file", "MB"]
    assert second.split() == [LONG, "model.safetensors", "1.5"]
    assert third.split() == ["b", "c", "10"]


def test_grid_fits_the_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    grid(("tensor", "MB"), [[LONG, "1.5"]], texts=1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in lines) <= 60


@pytest.mark.parametrize("forbidden", [False, True])
def test_output_has_no_colours_when_no_color_is_set(forbidden, capsys, monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    for variable in ("NO_COLOR", "CI"):  # CI makes the view plain lines
        monkeypatch.delenv(variable, raising=False)
    if forbidden:
        monkeypatch.setenv("NO_COLOR", "1")
    with SearchProgress(2, {"ffn": [4, 4]}, "remove 50% of parameters", progress=StderrProgress()) as view:
        view.show(Row(1, [1.0], None, None, 0.5, 1.0, 0, 100.0, 10**9, 1.0, None))
    grid(("tensor", "MB"), [["a", "1.5"]], texts=1)
    out, err = capsys.readouterr()
    assert bool(COLOUR.search(out + err)) is not forbidden


def test_speed_is_shown_with_the_peak_memory_if_the_device_measures_it(capsys: pytest.CaptureFixture[str]) -> None:
    speed = {"prefill_tokens_per_second": 12345.6, "decode_tokens_per_second": 78.9, "weight_bytes": 269_500_000}
    result = {"parameters": 1234567, "perplexity": []}
    on_gpu, on_cpu = speed | {"peak_memory_bytes": 1_234_560_000}, speed | {"peak_memory_bytes": None}
    print_measured([{"model": "small", "speed": on_gpu} | result, {"model": "base", "speed": on_cpu} | result])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["small", "base"],
        ["parameters", "1,234,567", "1,234,567"],
        ["prefill", "tokens/s", "12,346", "12,346"],
        ["decode", "tokens/s", "79", "79"],
        ["weights", "MB", "269.5", "269.5"],
        ["peak", "memory", "MB", "1,234.6"],
    ]
