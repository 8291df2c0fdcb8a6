"""The picture of a running search on a terminal: losses as small curves, what every layer keeps as a strip of bars.

Drawn from the rows that the search writes anyway, a few times a second, whatever the speed of its steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pgprune_cli.run.history import Row

BARS = "▁▂▃▄▅▆▇█"
FEW, MANY = (150, 158, 176), (47, 111, 237)
"""Colours of a layer that keeps nothing and of one that keeps all: grey to blue, on dark ground as on light."""

NARROWEST, WIDEST = 10, 60
"""Columns of a curve or a strip."""

RECENT = 20
"""Steps that the forward passes a second are an average of."""


class LiveView:
    """A renderable that stands for a search of `steps` steps; `units`: of every layer before pruning, by family."""

    def __init__(self, steps: int, units: Mapping[str, Sequence[int]], budget: str, rows: Sequence[Row] = ()) -> None:
        self.units = units
        self.budget = budget
        self.losses: list[float] = []
        self.judged: list[float] = []
        self.kept: Mapping[str, Sequence[int]] | None = None
        self.recent: deque[Row] = deque(maxlen=RECENT + 1)
        self.saved = rows[-1].step if rows else 0
        columns = (BarColumn(24, complete_style="blue"), MofNCompleteColumn(), TextColumn("steps  eta"))
        self.bar = Progress(*columns, TimeRemainingColumn())
        self.task = self.bar.add_task("search", total=steps, completed=self.saved)
        for row in rows:
            self._note(row)

    def add(self, row: Row) -> None:
        self._note(row)
        self.bar.update(self.task, completed=row.step)

    def _note(self, row: Row) -> None:
        self.recent.append(row)
        if row.mean_loss is not None:
            self.losses.append(row.mean_loss)
        if row.heldout_loss is not None:
            self.judged.append(row.heldout_loss)
        self.kept = row.kept or self.kept

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.bar
        width = max(NARROWEST, min(WIDEST, options.max_width - 22))
        table = Table.grid(padding=(0, 2))
        bad = bool(self.recent) and self.recent[-1].mean_loss is None
        table.add_row("loss", "bad" if bad else _nats(self.losses), curve(self.losses, width))
        table.add_row("held-out", _nats(self.judged), curve(self.judged, width))
        for family, kept in (self.kept or {}).items():
            counts = self.units[family]
            fractions = [some / count for some, count in zip(kept, counts, strict=True)]
            table.add_row(family, f"{sum(kept) / sum(counts):.0%}", strip(fractions, width))
        yield table
        yield Text(self._numbers(), style="dim")

    def _numbers(self) -> str:
        parts = [self.budget]
        if self.recent:
            first, *rest = self.recent
            row = self.recent[-1]
            if row.seconds > first.seconds:
                forward_passes = sum(len(one.losses) for one in rest)
                parts.append(f"{forward_passes / (row.seconds - first.seconds):,.1f} forward passes/s")
            parts += [f"{row.tokens_per_second:,.0f} tok/s", f"{row.memory_bytes / 1e9:.1f} GB"]
            parts += [f"skipped {row.skipped}"] if row.skipped else []
        parts.append(f"saved at step {self.saved}" if self.saved else "nothing saved yet")
        return " · ".join(parts)


def curve(values: Sequence[float], width: int) -> str:
    """Values as bars between the least and the greatest, in at most `width` columns; empty without any."""
    columns = _columns(values, width)
    if not columns:
        return ""
    least, span = min(columns), max(columns) - min(columns)
    return "".join(BARS[round((value - least) / span * 7) if span else 0] for value in columns)


def strip(fractions: Sequence[float], width: int) -> Text:
    """Fractions of 1 as bars, bluer the higher: a column a layer, or the mean of some where there are more layers."""
    text = Text()
    for value in _columns(fractions, width):
        red, green, blue = (round(few + (many - few) * value) for few, many in zip(FEW, MANY, strict=True))
        text.append(BARS[round(value * 7)], style=f"rgb({red},{green},{blue})")
    return text


def _columns(values: Sequence[float], width: int) -> list[float]:
    """The values, or the means of `width` runs of them."""
    if len(values) <= width:
        return list(values)
    edges = [place * len(values) // width for place in range(width + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def _nats(losses: Sequence[float]) -> str:
    return f"{losses[-1]:.3f}" if losses else "…"
