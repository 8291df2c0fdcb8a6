"""What the user sees of a running search: a live view on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.live import Live

from pgprune_cli.console.progress import SILENT, Progress
from pgprune_cli.console.stderr import STDERR
from pgprune_cli.console.terminal import can_redraw, plain_console
from pgprune_cli.run.history import Row
from pgprune_cli.search.live_view import LiveView

PLAIN_LINES = 10
"""About how many lines a whole search prints where there is no terminal."""


class SearchProgress:
    """Shows history rows as they come. Use it as a context manager.

    units: of every layer before pruning, by family; budget: in words; rows: of the search so far, if it is resumed;
    objective: name of what the search minimises.
    """

    def __init__(
        self,
        steps: int,
        units: Mapping[str, Sequence[int]],
        budget: str,
        rows: Sequence[Row] = (),
        progress: Progress = SILENT,
        objective: str = "loss",
    ) -> None:
        self.steps = steps
        self.progress = progress
        self.objective = objective
        self.heldout = "…"
        self.view = LiveView(steps, units, budget, rows, objective)
        self.live: Live | None = None

    def __enter__(self) -> SearchProgress:
        console = plain_console(STDERR)
        if self.progress.shows and can_redraw(console):
            self.live = Live(self.view, console=console, refresh_per_second=1)
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.live is not None:
            self.live.stop()

    def say(self, text: str) -> None:
        """Print one line, above the live view if there is one."""
        if self.live is not None:
            self.live.console.print(text, highlight=False, soft_wrap=True)
        else:
            self.progress.say(text)

    def show(self, row: Row) -> None:
        """Show a step that has been done."""
        self.view.add(row)
        if row.heldout_objective is not None:
            best = self.view.best
            earlier = "" if best in (None, row) else f" (best {best.heldout_objective:.3f} at step {best.step})"
            self.heldout = f"{row.heldout_objective:.3f}{earlier}"
        due = row.step % max(1, self.steps // PLAIN_LINES) == 0 or row.step in (1, self.steps)
        if due and self.live is None:
            loss = "not finite" if row.mean_loss is None else f"{row.mean_loss:.3f}"
            skipped = f" skipped {row.skipped}" if row.skipped else ""
            losses = f"{self.objective} {loss} held-out {self.heldout}" if row.losses else f"held-out {self.heldout}"
            speed = f"{row.tokens_per_second:,.0f} tok/s " if row.losses else ""
            memory = f"{row.memory_bytes / 1e9:.1f} GB"
            self.say(f"step {row.step}/{self.steps} {losses} {speed}{memory}{skipped} {row.seconds:.0f} s")

    def saved(self, step: int) -> None:
        """Show that a checkpoint has been written."""
        self.view.saved_step = step
