"""What an interrupted command has saved on disk, in words.

Only file names are looked at: a signal may arrive while heavy packages are being imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pgprune_cli.console.commands import command_line
from pgprune_cli.run.layout import (
    CHECKPOINT_RECORD,
    DECISION_RECORD,
    MEASURED_FILE,
    RECOVERY_RECORD,
    SCORES_FILE,
    TEACHER_FOLDER,
    checkpoint_folders,
    checkpoint_step,
    has_teacher_shards,
    training_checkpoint_folders,
    training_checkpoint_step,
    widths_files,
)


class SavedWork(NamedTuple):
    """text: what is saved, and where; complete: whether the command has nothing left to do."""

    text: str
    complete: bool = False


NOTHING = SavedWork("nothing is saved yet")
NOTHING_NEW = SavedWork("nothing new is saved")
"""Of a command that is stopped before it knows its run directory."""


def saved_by_init_scores(run: Path) -> SavedWork:
    """Describe what `init-scores` has saved. Its one file may be from an earlier call."""
    return SavedWork(f"the scores are saved in {run}") if (run / SCORES_FILE).exists() else NOTHING


def saved_by_search(run: Path, steps: int, step: int | None = None) -> SavedWork:
    """Describe what a search of `steps` steps has saved. step: the one just saved, if the caller knows it."""
    if (run / DECISION_RECORD).exists():
        return SavedWork(f"the decision is saved in {run}")
    step = step or _newest_step(run)
    if step is not None:
        return SavedWork(f"step {step} of {steps} is saved in {run}")
    layers = len(widths_files(run))
    if layers:
        noun = "layer" if layers == 1 else "layers"
        return SavedWork(f"the scores and the width tables of {layers} {noun} are saved in {run}")
    if (run / SCORES_FILE).exists():
        return SavedWork(f"the scores are saved in {run}, but no search step yet")
    return NOTHING


def saved_by_recover(run: Path, step: int | None = None, cache: Path | None = None) -> SavedWork:
    """Describe what a recovery has saved. step: the one just saved, if the caller knows it; cache: of predictions."""
    if (run / RECOVERY_RECORD).exists():
        return SavedWork(f"the recovery in {run} is finished", complete=True)
    finished = [folder for folder in training_checkpoint_folders(run) if (folder / CHECKPOINT_RECORD).exists()]
    step = step or max(filter(None, map(training_checkpoint_step, finished)), default=None)
    if step is not None:
        return SavedWork(f"step {step} is saved in {run}")
    cache = cache or run / TEACHER_FOLDER
    if has_teacher_shards(cache):
        return SavedWork(f"the dense model's predictions so far are saved in {cache}")
    return NOTHING


def saved_by_compare(out: Path, runs: Sequence[tuple[Path, int]]) -> SavedWork:
    """Describe what a comparison in `out` has saved. runs: its run directories, each with the steps of its search."""
    measured = sum((run / MEASURED_FILE).exists() for run, _ in runs)
    text = f"{measured} of {len(runs)} {'run is' if len(runs) == 1 else 'runs are'} measured in {out}"
    for run, steps in runs:
        step = None if (run / DECISION_RECORD).exists() else _newest_step(run)
        if step is not None:
            text += f", and step {step} of {steps} of {run.relative_to(out)} is saved"
    return SavedWork(text)


def saved_by_export(out: Path, repository: str | None = None) -> SavedWork:
    """Describe what an export to `out` has written, and how to finish its upload. An export is complete or absent."""
    if not out.exists():
        return SavedWork(f"nothing is written to {out}")
    upload = f". Upload it with: {command_line('hf', 'upload', repository, out)}" if repository else ""
    return SavedWork(f"{out} is complete{upload}", complete=True)


def _newest_step(run: Path) -> int | None:
    """Return the step of the newest checkpoint. Checkpoint folders are complete or absent."""
    steps = map(checkpoint_step, checkpoint_folders(run))
    return max((step for step in steps if step is not None), default=None)
