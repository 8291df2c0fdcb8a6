"""Read what a report shows of a recovery from its run directory, finished or still training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgprune_cli.console.commands import command_line
from pgprune_cli.recipe.reader import load
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.recipe.strict_yaml import read_text
from pgprune_cli.run.layout import RECIPE_FILE, RECOVERY_RECORD
from pgprune_cli.run.provenance import required_provenance
from pgprune_cli.run.training_history import TrainingRow, best_training_row, read_training_history
from pgprune_cli.run.training_record import TrainingRecord
from pgprune_cli.storage.records import read_record


@dataclass(frozen=True)
class Recovery:
    """The content of the run directory of a recovery. result: its record, None until it is finished."""

    name: str
    directory: Path
    recipe: Recipe
    recipe_text: str
    record: TrainingRecord
    rows: list[TrainingRow]
    result: dict[str, Any] | None
    provenance: list[dict[str, Any]]

    @property
    def is_finished(self) -> bool:
        """Whether the recovered model is written."""
        return self.result is not None

    @property
    def progress(self) -> str:
        """Return how far the training has come, in words."""
        done = self.rows[-1].step if self.rows else 0
        return "finished" if self.is_finished else f"step {done} of {self.record.steps}"

    @property
    def before(self) -> float | None:
        """The divergence on held-out text before the training, None until it is known."""
        return self.rows[0].heldout_divergence if self.rows else None

    @property
    def best(self) -> TrainingRow | None:
        """The row with the lowest divergence on held-out text, None before the first evaluation."""
        return best_training_row(self.rows)

    @property
    def repeat_command(self) -> str:
        """Return the command that repeats the recovery from the resolved recipe."""
        words = ["pgprune", "recover", self.record.student, "--teacher", self.record.teacher]
        return command_line(*words, "--recipe", self.directory / RECIPE_FILE, "--out", f"{self.directory.name}-again")


def read_recovery(directory: Path, name: str) -> Recovery:
    """Read the run directory of a recovery. Raises UserError if it is damaged."""
    path, result = directory / RECIPE_FILE, directory / RECOVERY_RECORD
    return Recovery(
        name=name,
        directory=directory,
        recipe=load(path),
        recipe_text=read_text(path),
        record=TrainingRecord.read(directory),
        rows=read_training_history(directory),
        result=read_record(result) if result.exists() else None,
        provenance=required_provenance(directory),
    )
