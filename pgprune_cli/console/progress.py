"""What a person sees of work that takes a while, on stderr: live on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
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
