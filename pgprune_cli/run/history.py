"""`metrics.jsonl`: the history of a search, one row per step, and one for the start."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pgprune_cli.run.layout import METRICS_FILE
from pgprune_cli.storage.rows import RowFile, read_rows


@dataclass(frozen=True)
class Row:
    """One row of `metrics.jsonl`: a step of the search, or the start as step 0, which has no masks.

    losses: the objective of every mask, in nats per token as all losses here; a non-finite one is None. heldout_loss,
    heldout_objective: of the current decision on held-out text; kept: how many query heads, channels or blocks of every
    layer it keeps, by family. These three are None at steps without an evaluation. bos: whether the windows begin with
    the BOS token.
    """

    step: int
    losses: list[float | None]
    baseline: float | None
    learning_rate: float | None
    entropy: float
    heldout_loss: float | None
    skipped: int
    tokens_per_second: float
    memory_bytes: int
    seconds: float
    kept: dict[str, list[int]] | None
    bos: bool = False
    heldout_objective: float | None = None

    @property
    def mean_loss(self) -> float | None:
        """The mean of the finite losses, or None without one."""
        finite = [loss for loss in self.losses if loss is not None]
        return sum(finite) / len(finite) if finite else None

    def metrics(self) -> dict[str, float]:
        """Return the numbers for trackers: `loss` is the mean objective of the masks, `kept/<family>` a count."""
        numbers = {
            "loss": self.mean_loss,
            "heldout_loss": self.heldout_loss,
            "heldout_objective": self.heldout_objective,
            "baseline": self.baseline,
            "learning_rate": self.learning_rate,
            "entropy": self.entropy,
            "skipped": self.skipped,
            "tokens_per_second": self.tokens_per_second,
            "memory_bytes": self.memory_bytes,
            "seconds": self.seconds,
        }
        kept = {f"kept/{family}": sum(widths) for family, widths in (self.kept or {}).items()}
        return {key: value for key, value in (numbers | kept).items() if value is not None}


def best_row(rows: Iterable[Row]) -> Row | None:
    """Return the row of the decision with the lowest objective on held-out text, None before the first evaluation."""
    evaluated = [row for row in rows if row.heldout_objective is not None]
    return min(evaluated, key=lambda row: row.heldout_objective or 0.0, default=None)


class History(RowFile):
    """`metrics.jsonl`, open for appending one row per step."""

    def __init__(self, run: Path) -> None:
        super().__init__(run / METRICS_FILE)


def read_history(run: Path) -> list[Row]:
    """Return the rows written so far, without a last line that is still being written.

    Raises UserError if a line is not a row.
    """
    return read_rows(run / METRICS_FILE, Row)
