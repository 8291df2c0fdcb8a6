"""The live view of a running search: losses as small curves, and what every layer keeps as a strip of bars.

It is drawn from the history rows that the search writes anyway, once per second, however fast the steps are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pgprune_cli.run.history import Row, best_row

BARS = "▁▂▃▄▅▆▇█"
EMPTY_COLOUR, FULL_COLOUR = (150, 158, 176), (47, 111, 237)
"""RGB of a layer that keeps nothing and of one that keeps everything: grey to blue, readable on dark and on light."""

MIN_COLUMNS, MAX_COLUMNS = 10, 60
"""Width of a curve or a strip."""

RECENT_STEPS = 20
"""Steps over which the forward passes per second are averaged."""


class LiveView:
    """A renderable for a search of `steps` steps.

    units: of every layer before pruning, by family; objective: name of what the search minimises.
    """

    def __init__(
        self,
        steps: int,
        units: Mapping[str, Sequence[int]],
        budget: str,
        rows: Sequence[Row] = (),
        objective: str = "loss",
    ) -> None:
        self.objective = objective
        self.units = units
        self.budget = budget
        self.losses: list[float] = []
        self.heldout: list[float] = []
        self.best: Row | None = None
        self.kept: Mapping[str, Sequence[int]] | None = None
        self.recent: deque[Row] = deque(maxlen=RECENT_STEPS + 1)
        self.saved_step = rows[-1].step if rows else 0
        columns = (BarColumn(24, complete_style="blue"), MofNCompleteColumn(), TextColumn("steps  eta"))
        self.bar = Progress(*columns, TimeRemainingColumn())
        self.task = self.bar.add_task("search", total=steps, completed=self.saved_step)
        for row in rows:
            self._record(row)

    def add(self, row: Row) -> None:
        """Add the row of a step that has been done."""
        self._record(row)
        self.bar.update(self.task, completed=row.step)

    def _record(self, row: Row) -> None:
        self.recent.append(row)
        if row.mean_loss is not None:
            self.losses.append(row.mean_loss)
        if row.heldout_objective is not None:
            self.heldout.append(row.heldout_objective)
        self.best = best_row([self.best, row] if self.best else [row])
        self.kept = row.kept or self.kept

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.bar
        width = max(MIN_COLUMNS, min(MAX_COLUMNS, options.max_width - 22))
        table = Table.grid(padding=(0, 2))
        last = self.recent[-1] if self.recent else None
        overflows = last is not None and bool(last.losses) and last.mean_loss is None
        table.add_row(self.objective, "not finite" if overflows else _nats(self.losses), curve(self.losses, width))
        table.add_row("held-out", _nats(self.heldout), curve(self.heldout, width))
        for family, kept in (self.kept or {}).items():
            counts = self.units[family]
            fractions = [
                layer_kept / count if count else 0.0  # a layer may have lost the block in an earlier pruning
                for layer_kept, count in zip(kept, counts, strict=True)
            ]
            table.add_row(family, f"{sum(kept) / max(sum(counts), 1):.0%}", strip(fractions, width))
        yield table
        yield Text(self._numbers(), style="dim")

    def _numbers(self) -> str:
        parts = [self.budget]
        if self.recent:
            first, *rest = self.recent
            row = self.recent[-1]
            if row.seconds > first.seconds:
                passes = sum(len(step.losses) for step in rest)
                parts.append(f"{passes / (row.seconds - first.seconds):,.1f} passes/s")
            parts += [f"{row.tokens_per_second:,.0f} tok/s", f"{row.memory_bytes / 1e9:.1f} GB"]
            parts += [f"skipped {row.skipped}"] if row.skipped else []
        parts += [f"best at step {self.best.step}"] if self.best else []
        parts.append(f"saved at step {self.saved_step}" if self.saved_step else "not saved yet")
        return " · ".join(parts)


def curve(values: Sequence[float], width: int) -> str:
    """Return values as bars between their minimum and maximum, in at most `width` columns; empty without values."""
    columns = _columns(values, width)
    if not columns:
        return ""
    low, span = min(columns), max(columns) - min(columns)
    return "".join(BARS[round((value - low) / span * 7) if span else 0] for value in columns)


def strip(fractions: Sequence[float], width: int) -> Text:
    """Return fractions of 1 as bars, bluer the higher: one column per layer, or the mean of several layers."""
    text = Text()
    for value in _columns(fractions, width):
        pairs = zip(EMPTY_COLOUR, FULL_COLOUR, strict=True)
        red, green, blue = (round(empty + (full - empty) * value) for empty, full in pairs)
        text.append(BARS[round(value * 7)], style=f"rgb({red},{green},{blue})")
    return text


def _columns(values: Sequence[float], width: int) -> list[float]:
    """Return the values, or the means of `width` runs of them."""
    if len(values) <= width:
        return list(values)
    edges = [place * len(values) // width for place in range(width + 1)]
    return [sum(values[start:end]) / (end - start) for start, end in pairwise(edges)]


def _nats(losses: Sequence[float]) -> str:
    return f"{losses[-1]:.3f}" if losses else "…"
