"""How a command reports on stderr what it is doing: live bars on a terminal, plain lines elsewhere, or nothing.

A `Progress` is passed down as a value. `SILENT` is the default everywhere, so that library code never has to ask
whether somebody is watching.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

from pgprune_cli.console.stderr import STDERR
from pgprune_cli.console.terminal import can_redraw, plain_console


class LayerProgress:
    """Counts work that goes through the layers of a model. This one shows nothing."""

    def layer_done(self) -> None:
        """Report that one more layer is done."""

    def batches_done(self, done: int, total: int) -> None:
        """Report, before the first layer, that `done` of `total` batches have gone through the whole model."""

    def steps_done(self, done: int, total: int) -> None:
        """Report, after the last layer, that `done` of `total` steps of a fit are done."""


NO_PROGRESS = LayerProgress()
"""Shows nothing."""


class Progress:
    """Reports what a command is doing. This one shows nothing.

    shows: whether anything reaches the user.
    """

    shows = False

    def say(self, text: str) -> None:
        """Print one line."""

    @contextmanager
    def working(self, text: str) -> Iterator[None]:
        """Announce something that takes a while, for as long as the `with` lasts."""
        yield

    @contextmanager
    def writing(self, text: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a bar over `total` bytes. Yields a function to call with the number of bytes just written."""
        yield lambda count: None

    @contextmanager
    def layers(self, text: str, total: int, done: int = 0) -> Iterator[LayerProgress]:
        """Show a bar over `total` layers, of which `done` are finished already."""
        yield NO_PROGRESS


SILENT = Progress()
"""Shows nothing."""


class StderrProgress(Progress):
    """Reports on stderr: spinners and bars on a terminal, one line per task elsewhere."""

    shows = True

    def say(self, text: str) -> None:
        plain_console(STDERR).print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def working(self, text: str) -> Iterator[None]:
        console = plain_console(STDERR)
        if can_redraw(console):
            with console.status(Text(text)):
                yield
        else:
            print(f"{text} …", file=STDERR)
            yield

    @contextmanager
    def writing(self, text: str, total: int) -> Iterator[Callable[[int], None]]:
        with self._bar(text, total, 0, "bytes", DownloadColumn(), TransferSpeedColumn()) as bar:
            yield bar.advance if bar else lambda count: None

    @contextmanager
    def layers(self, text: str, total: int, done: int = 0) -> Iterator[LayerProgress]:
        unit = TextColumn("{task.fields[unit]}")
        with self._bar(text, total, done, "layers", MofNCompleteColumn(), unit) as bar:
            yield bar or NO_PROGRESS

    @contextmanager
    def _bar(self, text: str, total: int, done: int, unit: str, *columns: ProgressColumn) -> Iterator[Bar | None]:
        """Draw a bar, or announce the task where lines cannot be redrawn; then there is no bar."""
        console = plain_console(STDERR)
        if not can_redraw(console):
            with self.working(text):
                yield None
            return
        before = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(16))
        with RichProgress(*before, *columns, TextColumn("eta"), TimeRemainingColumn(), console=console) as drawing:
            bar = Bar(drawing, text, total, done, unit)
            yield bar
            bar.fill()


class Bar(LayerProgress):
    """A bar that rich draws, over `total` units of work of which `done` were finished at the start."""

    def __init__(self, drawing: RichProgress, text: str, total: int, done: int, unit: str) -> None:
        self.drawing, self.total, self.done = drawing, total, done
        self.task = drawing.add_task(text, total=total, completed=done, unit=unit)

    def advance(self, count: int) -> None:
        """Move the bar on by `count` units of work."""
        self.drawing.update(self.task, advance=count)

    def fill(self) -> None:
        """Show that everything is done."""
        [task] = self.drawing.tasks
        self.drawing.update(self.task, completed=task.total)

    def layer_done(self) -> None:
        self.advance(1)

    def batches_done(self, done: int, total: int) -> None:
        if done < total:
            self.drawing.update(self.task, completed=done, total=total, unit="batches")
        else:  # reset the clock: a layer takes longer than a batch
            self.drawing.reset(self.task, completed=self.done, total=self.total, unit="layers")

    def steps_done(self, done: int, total: int) -> None:
        if done == 0:  # reset the clock here too
            self.drawing.reset(self.task, total=total, unit="steps")
        self.drawing.update(self.task, completed=done)
