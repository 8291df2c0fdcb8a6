"""What a person sees of a running search: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType

import psutil
import torch
from rich.console import Console
from rich.live import Live

from pgprune_cli.console.progress import SILENT, Progress, can_redraw
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
        progress: Progress = SILENT,
    ) -> None:
        self.steps = steps
        self.progress = progress
        self.console = Console(file=STDERR)
        self.heldout = "…"
        self.view = LiveView(steps, units, budget, rows)
        self.live: Live | None = None

    def __enter__(self) -> SearchProgress:
        if self.progress.shows and can_redraw(self.console):
            self.live = Live(self.view, console=self.console, refresh_per_second=1)
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.live is not None:
            self.live.stop()

    def say(self, text: str) -> None:
        """One line of its own."""
        self.progress.say(text)

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


def memory_in_use() -> int:
    """Bytes: of the accelerator at its peak where there is one, else of this process now."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return int(psutil.Process().memory_info().rss)
