"""What a person sees while a search runs, on stderr: a live line on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

import psutil
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from pgprune_cli.history import Row

PLAIN_LINES = 10
"""About how many lines a whole search prints where there is no terminal."""


class SearchProgress:
    """Shows rows as they come; use as a context manager."""

    def __init__(self, steps: int, quiet: bool = False) -> None:
        self.steps = steps
        self.quiet = quiet
        self.console = Console(stderr=True)
        self.heldout = "…"
        self.live = Progress(
            BarColumn(bar_width=8),  # all of the line fits into 80 columns
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self.console,
            transient=False,
        )
        self.task = self.live.add_task("search", total=steps, text="")

    def __enter__(self) -> SearchProgress:
        if self.console.is_terminal and not self.quiet:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.live.live.is_started:
            self.live.stop()

    def say(self, text: str) -> None:
        """One line of its own."""
        if not self.quiet:
            self.console.print(text, highlight=False, soft_wrap=True)

    def show(self, row: Row) -> None:
        """A step was done."""
        if row.heldout_loss is not None:
            self.heldout = f"{row.heldout_loss:.3f}"
        loss = "bad" if row.mean_loss is None else f"{row.mean_loss:.3f}"
        bad = f" skipped {row.skipped}" if row.skipped else ""
        losses = f"loss {loss} hard mask {self.heldout}"
        text = f"{losses} {row.tokens_per_second:,.0f} tok/s {row.memory_bytes / 1e9:.1f} GB{bad}"
        self.live.update(self.task, completed=row.step, text=text)
        due = row.step % max(1, self.steps // PLAIN_LINES) == 0 or row.step in (1, self.steps)
        if due and not self.console.is_terminal:
            self.say(f"step {row.step}/{self.steps} {text} {row.seconds:.0f} s")


@contextmanager
def working(text: str, quiet: bool = False) -> Iterator[None]:
    """A line that says what takes a while, with a spinner on a terminal."""
    console = Console(stderr=True)
    if quiet:
        yield
    elif console.is_terminal:
        with console.status(text):
            yield
    else:
        print(f"{text} …", file=sys.stderr, flush=True)
        yield


@contextmanager
def writing(text: str, total: int, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar over `total` bytes on a terminal, one line elsewhere. Gives what is to be told how many more are done."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        with working(text, quiet):
            yield lambda _: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(20), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TextColumn("eta"), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(text, total=total)
        yield lambda more: bar.update(task, advance=more)
        bar.update(task, completed=total)


def memory_in_use() -> int:
    """Bytes: of the accelerator at its peak where there is one, else of this process now."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return int(psutil.Process().memory_info().rss)
