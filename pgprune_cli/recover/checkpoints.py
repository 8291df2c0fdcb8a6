"""The checkpoints of a recovery: those of transformers' Trainer, each with a record that holds its checksums.

The record is written last, so a checkpoint without one is unfinished, and removed. A checkpoint that does not match its
record is refused. Kept are the last two and the best one on held-out text.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgprune_cli.errors import UserError
from pgprune_cli.run.checkpoint import CorruptCheckpoint
from pgprune_cli.run.layout import (
    CHECKPOINT_RECORD,
    CHECKPOINTS_FOLDER,
    training_checkpoint_folders,
    training_checkpoint_step,
)
from pgprune_cli.storage.atomic import sync
from pgprune_cli.storage.records import checksum, read_record, write_record
from pgprune_cli.storage.rows import Written

KEPT = 2
"""How many checkpoints a recovery keeps besides the best one."""
MOST = KEPT + 2
"""How many exist at the same time, while another one is being written."""
STATE_BYTES = 12
"""Bytes of a checkpoint for a trained weight: itself and the two moments of AdamW, all in float32."""
TRAINED = "model.safetensors"
"""The file of a checkpoint that holds the trained weights, by their names in the model, in float32."""
PICKLED = "training_args.bin"
"""The Trainer pickles its arguments, and nothing reads them."""


@dataclass(frozen=True)
class TrainingCheckpoint:
    """What the record of a checkpoint says.

    folder: where it is; heldout_divergence: of its weights, None if they were not evaluated; seconds: of training so
    far; history: the part of the history that belongs to this checkpoint.
    """

    folder: Path
    heldout_divergence: float | None
    seconds: float
    history: Written

    @property
    def step(self) -> int:
        """How many steps are done."""
        return training_checkpoint_step(self.folder) or 0


def is_finished(folder: Path) -> bool:
    """Return whether a checkpoint was written to its end."""
    return (folder / CHECKPOINT_RECORD).exists()


def finish(checkpoint: TrainingCheckpoint) -> None:
    """Sync the files of a checkpoint to disk and write its record. Then remove the checkpoints that are not kept."""
    folder = checkpoint.folder
    (folder / PICKLED).unlink(missing_ok=True)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in names:
        sync(folder / name)
    record = {
        "step": checkpoint.step,
        "heldout_divergence": checkpoint.heldout_divergence,
        "seconds": checkpoint.seconds,
        "history_bytes": checkpoint.history.bytes,
        "history_sha256": checkpoint.history.sha256,
        "files": {name: checksum(folder / name) for name in names},
    }
    write_record(folder / CHECKPOINT_RECORD, record)
    sync(folder.parent)
    drop_old(folder.parents[1])


def read_checkpoint(
    folder: Path, older: Iterable[Path] = (), advice: str = "Remove that directory to start the recovery over."
) -> TrainingCheckpoint:
    """Return a finished checkpoint after checking its files. An error names the last of the `older` ones, or `advice`.

    Raises:
        CorruptCheckpoint: the checkpoint is damaged.
    """
    try:
        record = read_record(folder / CHECKPOINT_RECORD)
        if record["step"] != training_checkpoint_step(folder):
            raise UserError(f"{CHECKPOINT_RECORD} belongs to step {record['step']}.")
        for name, expected in record["files"].items():
            if not (folder / name).is_file() or checksum(folder / name) != expected:
                raise UserError(f"{name} is missing or does not match its checksum.")
        return _of_record(folder, record)
    except (UserError, KeyError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        reason = reason.replace(f"{folder}/", "").removesuffix(".")
    before = next(reversed(list(older)), None)
    if before is not None:
        advice = f"To resume from {before.name}, remove that directory or recover with --skip-corrupt-checkpoint."
    raise CorruptCheckpoint(f"{folder}: the checkpoint is corrupt ({reason}). {advice}")


def latest(run: Path, skip_corrupt_checkpoint: bool = False) -> TrainingCheckpoint | None:
    """Return the newest checkpoint of a recovery, or None without one. Removes unfinished ones.

    With `skip_corrupt_checkpoint`, a corrupt newest checkpoint is removed and the one before it is returned, if that
    one is intact. Raises CorruptCheckpoint otherwise.
    """
    for folder in training_checkpoint_folders(run):
        if not is_finished(folder):
            shutil.rmtree(folder)
    folders = training_checkpoint_folders(run)
    if not folders:
        return None
    try:
        return read_checkpoint(folders[-1], folders[:-1])
    except CorruptCheckpoint:
        if not skip_corrupt_checkpoint or len(folders) == 1:
            raise
    previous = read_checkpoint(folders[-2], folders[:-2])
    shutil.rmtree(folders[-1])
    return previous


def best(run: Path) -> TrainingCheckpoint | None:
    """Return the checkpoint with the lowest divergence on held-out text, None without one. Checks all its files.

    Raises CorruptCheckpoint if it is damaged.
    """
    chosen = _best(run)
    again = "Remove that directory and run the same command again: it goes on from the other checkpoints."
    return None if chosen is None else read_checkpoint(chosen.folder, advice=again)


def drop_old(run: Path) -> None:
    """Remove all checkpoints but the last two and the best."""
    chosen = _best(run)
    for folder in training_checkpoint_folders(run)[:-KEPT]:
        if chosen is None or folder != chosen.folder:
            (folder / CHECKPOINT_RECORD).unlink()  # first, so that what a kill leaves is an unfinished checkpoint
            shutil.rmtree(folder)


def remove_all(run: Path) -> None:
    """Remove all checkpoints of a finished recovery."""
    for folder in training_checkpoint_folders(run):
        (folder / CHECKPOINT_RECORD).unlink(missing_ok=True)  # first, as above
    shutil.rmtree(run / CHECKPOINTS_FOLDER, ignore_errors=True)


def _best(run: Path) -> TrainingCheckpoint | None:
    """Return what the record of the best checkpoint says, without checking its files. Damaged records do not count."""
    candidates = []
    for folder in filter(is_finished, training_checkpoint_folders(run)):
        try:
            candidates.append(_of_record(folder, read_record(folder / CHECKPOINT_RECORD)))
        except (UserError, KeyError):
            continue
    evaluated = [candidate for candidate in candidates if candidate.heldout_divergence is not None]
    return min(evaluated, key=lambda candidate: candidate.heldout_divergence or 0.0, default=None)


def _of_record(folder: Path, record: dict[str, Any]) -> TrainingCheckpoint:
    written = Written(record["history_bytes"], record["history_sha256"])
    return TrainingCheckpoint(folder, record["heldout_divergence"], record["seconds"], written)
