"""What the user sees of a search."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest
from helpers.recipes import WIDTH_SEARCH
from rich.console import Console

from pgprune_cli.console.progress import SILENT, LayerProgress, Progress, StderrProgress
from pgprune_cli.errors import RunError
from pgprune_cli.jobs.search import search
from pgprune_cli.run.history import Row
from pgprune_cli.search.progress import PLAIN_LINES, SearchProgress


def row(step: int, losses: list[float | None], heldout: float | None = None, skipped: int = 0) -> Row:
    numbers = (skipped, 1234.5, 2_500_000_000, 60.0 + step)
    return Row(step, losses, 3.0, 0.01, 9.0, heldout, *numbers, None, heldout_objective=heldout)


BUDGET = "removing 50% of parameters"
UNITS = {"attention": [4, 4], "ffn": [24, 24]}


def show_steps(steps: int, progress: Progress) -> None:
    with SearchProgress(steps, UNITS, BUDGET, progress=progress) as view:
        for step in range(1, steps + 1):
            view.show(row(step, [3.0, 3.5], heldout=2.75 if step == 1 else None))


def test_in_a_pipe_a_search_prints_a_few_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show_steps(1000, StderrProgress())
    out, err = capsys.readouterr()
    lines = err.split("\n")
    assert out == ""
    assert lines[0] == "step 1/1000 loss 3.250 held-out 2.750 1,234 tok/s 2.5 GB 61 s"
    assert len(lines) == PLAIN_LINES + 2  # the first step, and an end of line
    assert lines[-2].startswith("step 1000/1000 loss ")
    assert lines[-1] == ""
    assert "\x1b" not in err
    assert "" not in lines[:-1]


def test_the_best_decision_so_far_is_shown_with_its_step(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(step, [] if step == 0 else [0.5], heldout) for step, heldout in enumerate((3.0, 2.5, 2.75))]
    rows = [replace(row, heldout_loss=8.0 - row.step) for row in rows]  # the loss need not agree with the objective
    with SearchProgress(2, UNITS, BUDGET, progress=StderrProgress(), objective="kl") as view:
        for each in rows:
            view.show(each)
    start, first, second = capsys.readouterr().err.splitlines()
    assert start == "step 0/2 held-out 3.000 2.5 GB 60 s"
    assert first.startswith("step 1/2 kl 0.500 held-out 2.500 1,234 tok/s")
    assert second.startswith("step 2/2 kl 0.500 held-out 2.750 (best 2.500 at step 1) 1,234 tok/s")


def test_a_short_search_prints_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    show_steps(4, StderrProgress())
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["1/4", "2/4", "3/4", "4/4"]


def test_silent_progress_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    show_steps(20, SILENT)
    with SILENT.working("loading"), SILENT.layers("scoring", 2) as layers, SILENT.writing("writing", 3) as advance:
        layers.batches_done(1, 1)
        layers.layer_done()
        advance(3)
    SILENT.say("done")
    assert capsys.readouterr() == ("", "")


def test_losses_that_are_not_finite_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with SearchProgress(2, UNITS, BUDGET, progress=StderrProgress()) as progress:
        progress.show(row(1, [None, 4.0], heldout=3.0, skipped=1))
        progress.show(row(2, [None, None], skipped=3))
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("step 1/2 loss 4.000 held-out 3.000 ")
    assert " skipped 1 " in first
    assert second.startswith("step 2/2 loss not finite held-out 3.000 ")
    assert " skipped 3 " in second


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal of 80 columns without colours receives."""
    written = io.StringIO()
    terminal = {"file": written, "force_terminal": True, "force_interactive": True, "width": 80, "no_color": True}
    monkeypatch.setattr("pgprune_cli.console.terminal.Console", lambda **how: Console(**how | terminal))
    monkeypatch.delenv("CI", raising=False)
    return written


def test_on_a_terminal_a_live_view_is_drawn(screen: io.StringIO) -> None:
    show_steps(3, StderrProgress())
    last = screen.getvalue().split("3/3")[-1]
    for part in ("3.250", "2.750", BUDGET, "1,234 tok/s", "2.5 GB", "not saved yet"):
        assert part in last


@pytest.mark.parametrize("variable", ["CI", "TERM"])
def test_in_a_log_or_on_a_dumb_terminal_lines_are_plain(variable, monkeypatch, capsys) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as a CI that shows colours sets it
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv(variable, {"CI": "true", "TERM": "dumb"}[variable])
    show_steps(3, StderrProgress())
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert not any("\x1b" in line for line in lines)


def test_work_is_announced_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with StderrProgress().working("loading the model"):
        pass
    assert capsys.readouterr() == ("", "loading the model …\n")


def test_layers_are_counted(screen: io.StringIO) -> None:
    with suppress(RunError), StderrProgress().layers("scoring", 3) as bar:
        bar.layer_done()
        bar.layer_done()
        raise RunError("out of memory")
    last = screen.getvalue().split("scoring")[-1]
    assert "2/3 layers" in last


def test_layers_that_were_done_before_count(screen: io.StringIO) -> None:
    with suppress(RunError), StderrProgress().layers("measuring", 4, done=2) as bar:
        bar.layer_done()
        raise RunError("out of memory")
    assert "3/4 layers" in screen.getvalue().split("measuring")[-1]


def test_what_goes_through_all_layers_before_the_first_is_counted_too(screen: io.StringIO) -> None:
    """On one line of a terminal of 80 columns, behind the longest text that there is."""
    text = "measuring every layer's widths"
    with suppress(RunError), StderrProgress().layers(text, 30, done=2) as bar:
        bar.batches_done(0, 128)
        bar.batches_done(105, 128)
        bar.drawing.refresh()
        assert re.search(r"━ +105/128 batches eta -:--:--", screen.getvalue().split(text)[-1])
        bar.batches_done(128, 128)
        bar.drawing.refresh()
        assert re.search(r"━ +2/30 layers eta -:--:--", screen.getvalue().split(text)[-1])
        bar.layer_done()
        raise RunError("out of memory")
    assert "3/30 layers" in screen.getvalue().split(text)[-1]


def test_steps_of_a_fit_are_counted_after_the_layers(screen: io.StringIO) -> None:
    with StderrProgress().layers("repairing", 2) as bar:
        bar.layer_done()
        bar.layer_done()
        for done in range(3):
            bar.steps_done(done, 60)
        bar.drawing.refresh()
        assert re.search(r" 2/60 steps eta ", screen.getvalue().split("repairing")[-1])
    assert "60/60 steps" in screen.getvalue().split("repairing")[-1]


class CountedLayers(LayerProgress):
    """Records the kinds of reports in order: "layer", "batches", "all batches", "steps" or "all steps"."""

    def __init__(self, reports: list[str]) -> None:
        self.reports = reports

    def layer_done(self) -> None:
        self.reports.append("layer")

    def batches_done(self, done: int, total: int) -> None:
        self.reports.append("all batches" if done == total else "batches")

    def steps_done(self, done: int, total: int) -> None:
        self.reports.append("all steps" if done == total else "steps")


class CountedProgress(Progress):
    """Records the reports of all work that goes through the layers, by its text."""

    def __init__(self) -> None:
        self.reports: dict[str, list[str]] = {}

    @contextmanager
    def layers(self, text: str, total: int, done: int = 0) -> Iterator[LayerProgress]:
        yield CountedLayers(self.reports.setdefault(text, []))


def test_scores_and_width_table_report_all_batches_before_their_first_layer(small, tmp_path) -> None:
    """The repair has nothing to read before its first layer if the width table has read it."""
    progress = CountedProgress()
    search(small(*WIDTH_SEARCH), tmp_path / "run", progress=progress)
    assert len(progress.reports) == 3
    with_batches = [reports for reports in progress.reports.values() if "all batches" in reports]
    assert with_batches
    for reports in with_batches:
        assert reports[reports.index("layer") - 1] == "all batches"
        assert "layer" not in reports[: reports.index("all batches")]


def test_the_repair_reports_the_fit_of_the_last_layers_after_all_layers(small, tmp_path) -> None:
    progress = CountedProgress()
    search(small(*WIDTH_SEARCH, "repair.method=sublayer", "repair.last_layers=2"), tmp_path / "run", progress=progress)
    reports = progress.reports["repairing the kept weights"]
    layers, steps = reports.index("steps"), reports.count("steps")
    assert reports == ["layer"] * layers + ["steps"] * steps + ["all steps"]
    assert layers and steps


def test_search_is_silent_by_default(small, tmp_path, capfd) -> None:
    search(small(*WIDTH_SEARCH), tmp_path / "run")
    assert capfd.readouterr() == ("", "")


def test_layers_are_one_line_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with StderrProgress().layers("scoring", 3) as bar:
        bar.batches_done(1, 2)
        bar.layer_done()
    assert capsys.readouterr() == ("", "scoring …\n")
