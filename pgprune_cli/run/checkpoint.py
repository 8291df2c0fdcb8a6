"""The state of a search on disk: whole or absent, versioned, checksummed; damage is refused, never started over.

A checkpoint is a directory `checkpoints/step-<n>/` of two files, written under a temporary name and renamed. The last
two are kept. `metrics.jsonl` grows beside them, and a checkpoint says how many of its bytes belong to it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from pgprune_cli.core.units import SearchState
from pgprune_cli.core.widths import WidthState
from pgprune_cli.errors import UserError
from pgprune_cli.run.history import Written
from pgprune_cli.run.layout import CHECKPOINTS_FOLDER
from pgprune_cli.storage.atomic import new_directory, write_bytes
from pgprune_cli.storage.records import checksum, read_json, read_tensors, refuse_newer, with_checksum, write_record

VERSION = 3
KEPT = 2
CHECKPOINT_TENSORS = "state.safetensors"
CHECKPOINT_RECORD = "state.json"
STATES: dict[str, type[SearchState] | type[WidthState]] = {"units": SearchState, "widths": WidthState}


@dataclass(frozen=True)
class Checkpoint:
    """Everything a search goes on from.

    state: of the policy, its parameters, step and generator; data_position: batches drawn; schedule: [name, full rate,
    steps] of the learning rate; bad_steps: how many steps in a row had no finite loss; forward_passes: model evaluations so
    far; seconds: of search so far; history: what of `metrics.jsonl` goes with it; identity: digest of the recipe and
    scores that the search belongs to.
    """

    state: SearchState | WidthState
    data_position: int
    bad_steps: int
    forward_passes: int
    seconds: float
    history: Written
    identity: str


def save_checkpoint(run: Path, checkpoint: Checkpoint) -> Path:
    """Writes `checkpoint` into the run directory and drops all but the last two. Returns its directory."""
    state = checkpoint.state
    target = run / CHECKPOINTS_FOLDER / _name(state.step)
    if target.exists():  # a search that resumes here and stops at once
        return target
    values = {entry.name: getattr(state, entry.name) for entry in fields(state)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    with new_directory(target) as temporary:
        write_bytes(temporary / CHECKPOINT_TENSORS, save(tensors))
        record = {
            "version": VERSION,
            "policy": next(name for name, kind in STATES.items() if isinstance(state, kind)),
            **{name: value for name, value in values.items() if name not in tensors},
            "data_position": checkpoint.data_position,
            "bad_steps": checkpoint.bad_steps,
            "forward_passes": checkpoint.forward_passes,
            "seconds": checkpoint.seconds,
            "history_bytes": checkpoint.history.bytes,
            "history_sha256": checkpoint.history.sha256,
            "identity": checkpoint.identity,
            "state_sha256": checksum(temporary / CHECKPOINT_TENSORS),
        }
        write_record(temporary / CHECKPOINT_RECORD, record)
    drop_old(run)
    return target


def drop_old(run: Path) -> None:
    """Removes all checkpoints but the last two, and what is left of one whose removal was cut short."""
    for old in _all(run)[:-KEPT]:
        shutil.rmtree(old)


def latest_checkpoint(run: Path, skip_corrupt_checkpoint: bool = False) -> Checkpoint | None:
    """The newest checkpoint of a run, or None where it has none. Raises UserError when that one is damaged.

    With `skip_corrupt_checkpoint` a damaged one goes, where the one before it is whole, which then is the newest.
    """
    folders = _all(run)
    if not folders:
        return None
    try:
        return load_checkpoint(folders[-1], folders[:-1])
    except CorruptCheckpoint:
        if not skip_corrupt_checkpoint or len(folders) == 1:
            raise
    before = load_checkpoint(folders[-2], folders[:-2])
    shutil.rmtree(folders[-1])
    return before


class CorruptCheckpoint(UserError):  # noqa: N818  (it says what the file is)
    """A checkpoint is not what was written."""


def load_checkpoint(folder: Path, older: Sequence[Path] = ()) -> Checkpoint:
    """The checkpoint in `folder`; `older` ones there are. Raises CorruptCheckpoint, or UserError for one of another version."""
    remedy = (
        f"go on from {older[-1].name}, or search with --skip-corrupt-checkpoint" if older else "start this search over"
    )
    try:
        record = read_json(folder / CHECKPOINT_RECORD)
        if record != with_checksum(record):
            raise UserError(f"{CHECKPOINT_RECORD} is not what was written")
        if record["version"] == VERSION:
            return _read(folder, record)
    except (UserError, KeyError, ValueError, TypeError) as error:
        raise CorruptCheckpoint(f"{folder}: damaged checkpoint: {error}; remove that directory to {remedy}") from None
    refuse_newer(folder, record["version"], VERSION)
    raise UserError(
        f"{folder}: of version {record['version']}, and this pgprune reads {VERSION}; start over with --out"
    )


def _read(folder: Path, record: dict[str, Any]) -> Checkpoint:
    if folder.name != _name(record["step"]):
        raise UserError(f"{CHECKPOINT_RECORD} is of {_name(record['step'])}")
    if not (folder / CHECKPOINT_TENSORS).exists() or checksum(folder / CHECKPOINT_TENSORS) != record["state_sha256"]:
        raise UserError(f"{CHECKPOINT_TENSORS} is not what was written")
    kind = STATES[record["policy"]]
    values: dict[str, Any] = record | read_tensors(folder / CHECKPOINT_TENSORS)
    return Checkpoint(
        kind(**{entry.name: values[entry.name] for entry in fields(kind)}),
        record["data_position"],
        record["bad_steps"],
        record["forward_passes"],
        record["seconds"],
        Written(record["history_bytes"], record.get("history_sha256", "")),
        record["identity"],
    )


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _all(run: Path) -> list[Path]:
    return sorted((run / CHECKPOINTS_FOLDER).glob("step-*"))
