"""verify, for what a recovery wrote besides the model: its run directory, checkpoints and cached predictions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path

from pgprune_cli.errors import UserError
from pgprune_cli.recipe.reader import load
from pgprune_cli.recover.checkpoints import read_checkpoint
from pgprune_cli.recover.teacher_cache import CacheKey, missing_shards, open_shard
from pgprune_cli.run.layout import (
    CHECKPOINT_RECORD,
    CHECKPOINTS_FOLDER,
    PROVENANCE_FILE,
    RECIPE_FILE,
    RECOVERY_RECORD,
    TEACHER_FOLDER,
    TEACHER_RECORD,
    TRAINING_HISTORY,
    TRAINING_RECORD,
    WRITING_RECORD,
    training_checkpoint_folders,
    training_checkpoint_step,
)
from pgprune_cli.run.recovery import read_recoveries
from pgprune_cli.run.training_history import read_training_history
from pgprune_cli.run.training_record import TrainingRecord
from pgprune_cli.storage.records import read_record
from pgprune_cli.storage.rows import refuse_other_rows

PARTS = (
    RECIPE_FILE,
    TRAINING_RECORD,
    TRAINING_HISTORY,
    CHECKPOINTS_FOLDER,
    TEACHER_FOLDER,
    WRITING_RECORD,
    RECOVERY_RECORD,
)
"""What the run directory of a recovery may contain. An unfinished one has only some of it."""


def parts_of_recovery(run: Path) -> list[str]:
    """Return the parts that a run directory has."""
    return [part for part in PARTS if (run / part).exists()]


def check_recovery(run: Path) -> Iterator[str]:
    """Yield the faults of a recovery's run directory, one line for each."""
    for part in parts_of_recovery(run):
        try:
            yield from _check_part(run, part)
        except UserError as error:
            yield str(error)
    if not (run / PROVENANCE_FILE).exists():
        yield f"{run}: {PROVENANCE_FILE} is missing."


def _check_part(run: Path, part: str) -> Iterable[str]:
    if part == RECIPE_FILE:
        load(run / RECIPE_FILE)
    elif part == TRAINING_RECORD:
        TrainingRecord.read(run)
    elif part == TRAINING_HISTORY:
        read_training_history(run)
    elif part == WRITING_RECORD:
        read_record(run / WRITING_RECORD)
    elif part == RECOVERY_RECORD:
        read_recoveries(run)
    elif part == TEACHER_FOLDER and is_cache(run / TEACHER_FOLDER):
        return check_cache(run / TEACHER_FOLDER)
    elif part == CHECKPOINTS_FOLDER:
        return _check_checkpoints(run)
    return []


def _check_checkpoints(run: Path) -> Iterator[str]:
    folders = [folder for folder in training_checkpoint_folders(run) if is_training_checkpoint(folder)]
    for number, folder in enumerate(folders):
        try:
            checkpoint = read_checkpoint(folder, folders[:number])
            refuse_other_rows(run / TRAINING_HISTORY, checkpoint.history)
        except UserError as error:
            yield str(error)


def is_training_checkpoint(path: Path) -> bool:
    """Return whether a directory is a whole checkpoint of a recovery."""
    return training_checkpoint_step(path) is not None and (path / CHECKPOINT_RECORD).exists()


def check_training_checkpoint(path: Path) -> Iterable[str]:
    """Return no faults, or raise UserError for a damaged checkpoint."""
    read_checkpoint(path)
    return []


def is_cache(path: Path) -> bool:
    """Return whether a directory holds cached predictions of a dense model."""
    return (path / TEACHER_RECORD).exists()


def check_cache(path: Path) -> Iterator[str]:
    """Yield the faults of cached predictions. Unless they are complete, shards may be missing."""
    record = read_record(path / TEACHER_RECORD)
    try:
        key = CacheKey(**{entry.name: record[entry.name] for entry in fields(CacheKey)})
        missing = set(missing_shards(path, key))
        complete = record["covered"] is not None
    except (KeyError, TypeError) as error:
        yield f"{path / TEACHER_RECORD}: damaged ({error!r})."
        return
    for index in range(len(key.shards)):
        try:
            if index not in missing or complete:
                open_shard(path, key, index)
        except UserError as error:
            yield str(error)
