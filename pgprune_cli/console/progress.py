"""What a person sees of work that takes a while, on stderr: live on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType

import psutil
import torch
from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from pgprune_cli.console.stderr import STDERR
from pgprune_cli.run.history import Row
from pgprune_cli.search.live_view import LiveView

PLAIN_LINES = 10
"""About how many lines a whole search prints where there is no terminal."""


class SearchProgress:
    """Shows rows as they come; use as a context manager.

    units: of every layer before pruning, by family; budget: in words; rows: of the search so far, where it goes on.
    """

    def __init__(
        self,
        steps: int,
        units: Mapping[str, Sequence[int]],
        budget: str,
        rows: Sequence[Row] = (),
        quiet: bool = False,
    ) -> None:
        self.steps = steps
        self.quiet = quiet
        self.console = Console(file=STDERR)
        self.heldout = "…"
        self.view = LiveView(steps, units, budget, rows)
        self.live: Live | None = None

    def __enter__(self) -> SearchProgress:
        if not self.quiet and draws(self.console):
            self.live = Live(self.view, console=self.console, refresh_per_second=1)
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.live is not None:
            self.live.stop()

    def say(self, text: str) -> None:
        """One line of its own."""
        if not self.quiet:
            self.console.print(text, highlight=False, soft_wrap=True)

    def show(self, row: Row) -> None:
        """A step was done."""
        self.view.add(row)
        if row.heldout_loss is not None:
            self.heldout = f"{row.heldout_loss:.3f}"
        due = row.step % max(1, self.steps // PLAIN_LINES) == 0 or row.step in (1, self.steps)
        if due and self.live is None:
            loss = "bad" if row.mean_loss is None else f"{row.mean_loss:.3f}"
            bad = f" skipped {row.skipped}" if row.skipped else ""
            speed = f"{row.tokens_per_second:,.0f} tok/s {row.memory_bytes / 1e9:.1f} GB"
            losses = f"loss {loss} held-out {self.heldout}"
            self.say(f"step {row.step}/{self.steps} {losses} {speed}{bad} {row.seconds:.0f} s")

    def saved(self, step: int) -> None:
        """A checkpoint was written."""
        self.view.saved = step


def draws(console: Console) -> bool:
    """Whether lines can be drawn over: on a terminal that is not dumb and no log of a CI."""
    return console.is_interactive and not os.environ.get("CI")


@contextmanager
def working(text: str, quiet: bool = False) -> Iterator[None]:
    """A line that says what takes a while, with a spinner on a terminal."""
    console = Console(file=STDERR)
    if quiet:
        yield
    elif draws(console):
        with console.status(text):
            yield
    else:
        print(f"{text} …", file=STDERR)
        yield


@contextmanager
def writing(text: str, total: int, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar over `total` bytes on a terminal, one line elsewhere. Gives what is to be told how many more are done."""
    with _bar(text, total, quiet, DownloadColumn(), TransferSpeedColumn()) as bar:
        yield bar.on_more


@contextmanager
def through_layers(text: str, total: int, quiet: bool = False, done: int = 0) -> Iterator[Bar]:
    """Likewise over `total` layers, of which so many were `done` before. Gives what is to be told of them."""
    with _bar(text, total, quiet, MofNCompleteColumn(), TextColumn("{task.fields[unit]}"), done=done) as bar:
        yield bar


class Bar:
    """Is told of work as it is done; without a `bar` to draw, it keeps that to itself."""

    def __init__(self, bar: Progress | None, text: str, total: int, done: int) -> None:
        self.bar = bar
        self.total, self.done = total, done
        if bar is not None:
            self.task = bar.add_task(text, total=total, completed=done, unit="layers")

    def on_more(self, more: int) -> None:
        """So many more are done."""
        if self.bar is not None:
            self.bar.update(self.task, advance=more)

    def on_batches(self, done: int, total: int) -> None:
        """Before the first layer: how many of the batches are done that go through all layers."""
        if self.bar is None:
            return
        if done < total:
            self.bar.update(self.task, completed=done, total=total, unit="batches")
        else:  # with a clock of their own, as a layer takes longer than a batch
            self.bar.reset(self.task, completed=self.done, total=self.total, unit="layers")


@contextmanager
def _bar(text: str, total: int, quiet: bool, *columns: ProgressColumn, done: int = 0) -> Iterator[Bar]:
    console = Console(file=STDERR)
    if quiet or not draws(console):
        with working(text, quiet):
            yield Bar(None, text, total, done)
        return
    spinner, ends = SpinnerColumn(), (TextColumn("eta"), TimeRemainingColumn())
    with Progress(spinner, TextColumn("{task.description}"), BarColumn(16), *columns, *ends, console=console) as drawn:
        bar = Bar(drawn, text, total, done)
        yield bar
        drawn.update(bar.task, completed=total)


def memory_in_use() -> int:
    """Bytes: of the accelerator at its peak where there is one, else of this process now."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return int(psutil.Process().memory_info().rss)
