"""`training.jsonl`: the history of a recovery, one row per logged step, and one for the start."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from pgprune_cli.run.layout import TRAINING_HISTORY
from pgprune_cli.storage.rows import RowFile, read_rows


@dataclass(frozen=True)
class TrainingRow:
    """One row of `training.jsonl`: an optimizer step, or the start as step 0, at which only the held-out text is read.

    tokens: read for training so far, on all devices; loss: what is minimised, the mean since the row before;
    divergence: its part that compares the predictions with the dense model's; heldout_divergence: the divergence on
    held-out text, None at steps without an evaluation. All of these are in nats per token. learning_rate: of this step;
    tokens_per_second: since the row before, without evaluations; memory_bytes: the peak so far; seconds: of training
    and evaluation so far, over all calls. loss, divergence, learning_rate and tokens_per_second are None at the start.
    """

    step: int
    tokens: int
    loss: float | None
    divergence: float | None
    heldout_divergence: float | None
    learning_rate: float | None
    tokens_per_second: float | None
    memory_bytes: int
    seconds: float

    def metrics(self) -> dict[str, float]:
        """Return the numbers for trackers: all of the row but its step and those that are None."""
        return {key: value for key, value in asdict(self).items() if key != "step" and value is not None}


class TrainingHistory(RowFile):
    """`training.jsonl`, open for appending one row per logged step."""

    def __init__(self, run: Path) -> None:
        super().__init__(run / TRAINING_HISTORY)


def read_training_history(run: Path) -> list[TrainingRow]:
    """Return the rows written so far, without a last line that is still being written.

    Raises UserError if a line is not a row.
    """
    return read_rows(run / TRAINING_HISTORY, TrainingRow)


def best_training_row(rows: Iterable[TrainingRow]) -> TrainingRow | None:
    """Return the row with the lowest divergence on held-out text, None before the first evaluation.

    It is the start if no step is better: then the weights are written as they were.
    """
    evaluated = [row for row in rows if row.heldout_divergence is not None]
    return min(evaluated, key=lambda row: row.heldout_divergence or 0.0, default=None)
