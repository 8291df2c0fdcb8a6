"""The picture of a running search."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from pgprune_cli.run.history import Row
from pgprune_cli.search.live_view import LiveView, curve, strip

UNITS = {"attention": [4, 4], "ffn": [24, 24]}


def row(step: int, kept: dict[str, list[int]] | None = None, losses: tuple[float | None, ...] = (3.0, 4.0)) -> Row:
    heldout, numbers = 2.75 if kept else None, (0, 1000.0, 2_500_000_000, 10.0 * step)
    return Row(step, list(losses), None, None, 9.0, None, *numbers, kept, heldout_objective=heldout)


def shown(view: LiveView, width: int = 80, **options) -> list[str]:
    console = Console(width=width, force_terminal=True, **options)
    with console.capture() as capture:
        console.print(view)
    return capture.get().splitlines()


def plain(view: LiveView, width: int = 80) -> list[str]:
    return shown(view, width, color_system=None)


def test_a_curve_runs_from_the_least_to_the_greatest() -> None:
    assert curve([1.0, 2.0, 3.0, 8.0], 10) == "▁▂▃█"
    assert curve([5.0, 5.0], 10) == "▁▁"
    assert curve([], 10) == ""


def test_a_long_curve_is_made_of_means() -> None:
    assert curve([0.0, 2.0, 8.0, 6.0, 3.0, 5.0], 3) == "▁█▅"
    assert len(curve([float(n) for n in range(1001)], 60)) == 60


def test_a_strip_has_a_bar_a_layer_bluer_the_more_it_keeps() -> None:
    text = strip([0.0, 0.5, 1.0], 10)
    assert text.plain == "▁▅█"  # half of seven is rounded to even
    blues = [int(str(span.style).rstrip(")").split(",")[2]) for span in text.spans]
    assert blues == sorted(blues)
    assert len(strip([0.5] * 100, 60).plain) == 60


def test_the_view_says_how_much_of_every_family_stays_where() -> None:
    view = LiveView(10, UNITS, "50% of parameters go")
    view.add(row(1, {"attention": [1, 4], "ffn": [24, 0]}))
    view.add(row(2))
    lines = plain(view, 100)
    assert [line.split() for line in lines[1:5]] == [
        ["loss", "3.500", "▁▁"],
        ["held-out", "2.750", "▁"],
        ["attention", "62%", "▃█"],
        ["ffn", "50%", "█▁"],
    ]
    assert "2/10" in lines[0]
    numbers = "50% of parameters go · 0.2 passes/s · 1,000 tok/s · 2.5 GB · best at step 1 · not saved yet"
    assert lines[5].rstrip() == numbers


def test_a_layer_that_lacks_a_block_keeps_nothing_of_it() -> None:
    view = LiveView(10, {"attention": [0, 4], "ffn": [0, 0]}, "50% of parameters go")
    view.add(row(1, {"attention": [0, 2], "ffn": [0, 0]}))
    assert [line.split() for line in plain(view)[3:5]] == [["attention", "50%", "▁▅"], ["ffn", "0%", "▁▁"]]


def test_the_view_goes_on_where_the_search_does() -> None:
    view = LiveView(10, UNITS, "50% of parameters go", [row(step) for step in (1, 2, 3)])
    assert "3/10" in plain(view)[0]
    view.add(row(4, losses=(None, None)))
    view.saved_step = 4
    lines = plain(view)
    assert lines[1].split() == ["loss", "not", "finite", "▁▁▁"]
    assert lines[-1].rstrip().endswith("saved at step 4")


def test_the_view_shows_the_start_and_the_step_of_the_best_decision() -> None:
    view = LiveView(10, UNITS, "50% of parameters go", objective="kl")
    view.add(replace(row(0, {"ffn": [24, 0]}, losses=()), heldout_objective=0.5))
    assert plain(view)[1].split() == ["kl", "…"]
    view.add(replace(row(1, {"ffn": [24, 0]}), heldout_objective=0.25))
    view.add(replace(row(2, {"ffn": [24, 0]}), heldout_objective=0.75))
    lines = plain(view, 120)
    assert lines[1].split() == ["kl", "3.500", "▁▁"]
    assert "best at step 1 ·" in lines[-1]


@pytest.mark.parametrize("width", [30, 80, 200])
def test_the_view_is_no_wider_than_the_terminal(width) -> None:
    view = LiveView(1000, {"ffn": [24] * 80}, "50% of parameters go")
    for step in range(1, 200):
        view.add(row(step, {"ffn": [12] * 80}))
    assert max(map(len, plain(view, width))) <= width


def test_no_color_is_respected(monkeypatch) -> None:
    view = LiveView(10, UNITS, "50% of parameters go")
    view.add(row(1, {"attention": [1, 4], "ffn": [24, 0]}))
    assert any("38;2;" in line for line in shown(view, color_system="truecolor"))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not any("38;2;" in line for line in shown(view, color_system="truecolor"))


def calls_in(action: Callable[[], object]) -> int:
    """Return how many functions the action calls."""
    calls: Counter[str] = Counter()
    sys.setprofile(lambda _frame, event, _argument: calls.update([event]))
    try:
        action()
    finally:
        sys.setprofile(None)
    return calls["call"] + calls["c_call"]


def test_a_late_step_costs_the_view_no_more_work_than_an_early_one() -> None:
    view = LiveView(15_000, UNITS, "50% of parameters go")
    for step in range(1, 100):
        view.add(row(step))
    early = calls_in(lambda: view.add(row(100)))
    for step in range(101, 1000):
        view.add(row(step))
    assert calls_in(lambda: view.add(row(1000))) <= early
