"""Checkpoints: the state of a search on disk, whole or absent, with checksums. A corrupt one is refused.

A checkpoint is a folder with two files (tensors and a JSON record), which is written under a temporary name and then
renamed. The last two are kept. The history grows outside of it, so a checkpoint records how many bytes of it are its
own.
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
from pgprune_cli.run.layout import CHECKPOINT_RECORD, CHECKPOINT_TENSORS, checkpoint_folder, checkpoint_folders
from pgprune_cli.storage.atomic import new_directory, write_bytes
from pgprune_cli.storage.records import checksum, read_record, read_tensors, write_record
from pgprune_cli.storage.rows import Written

VERSION = 3
KEPT = 2
"""How many checkpoints a run keeps."""
BEST_CENTRE = "best_centre"
"""Name of the tensor `Best.centre`."""
STATES: dict[str, type[SearchState] | type[WidthState]] = {"units": SearchState, "widths": WidthState}
"""The state of each policy."""


@dataclass(frozen=True)
class Best:
    """The decision with the lowest objective on held-out text so far.

    step: steps done when it was evaluated; objective: in nats per token; centre: what the policy makes it from, a
    float64 tensor.
    """

    step: int
    objective: float
    centre: Tensor


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a search needs to resume.

    state: of the policy, with its step and random generator; best: the best decision seen, None before the first one;
    bad_steps: steps in a row without a finite loss; seconds: search time so far; history: the part of the history that
    belongs to this checkpoint; identity: digest of the recipe, model and scores.
    """

    state: SearchState | WidthState
    best: Best | None
    bad_steps: int
    seconds: float
    history: Written
    identity: str


class CorruptCheckpoint(UserError):  # noqa: N818  (it names the file's state)
    """A checkpoint does not match its checksum or misses a part."""


def save_checkpoint(run: Path, checkpoint: Checkpoint) -> Path:
    """Write `checkpoint` into the run directory and remove all but the last two. Return its folder."""
    state = checkpoint.state
    folder = checkpoint_folder(run, state.step)
    if folder.exists():  # a resumed search that stops before its next step
        return folder
    values = {entry.name: getattr(state, entry.name) for entry in fields(state)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    best = checkpoint.best
    if best is not None:
        tensors[BEST_CENTRE] = best.centre.clone()  # it may be the state's own
    with new_directory(folder) as temporary:
        write_bytes(temporary / CHECKPOINT_TENSORS, save(tensors))
        record = {
            "version": VERSION,
            "policy": next(name for name, kind in STATES.items() if isinstance(state, kind)),
            **{name: value for name, value in values.items() if name not in tensors},
            "best": None if best is None else {"step": best.step, "objective": best.objective},
            "bad_steps": checkpoint.bad_steps,
            "seconds": checkpoint.seconds,
            "history_bytes": checkpoint.history.bytes,
            "history_sha256": checkpoint.history.sha256,
            "identity": checkpoint.identity,
            "state_sha256": checksum(temporary / CHECKPOINT_TENSORS),
        }
        write_record(temporary / CHECKPOINT_RECORD, record)
    drop_old(run)
    return folder


def drop_old(run: Path) -> None:
    """Remove all checkpoints but the last two, including one whose removal was interrupted."""
    for folder in checkpoint_folders(run)[:-KEPT]:
        shutil.rmtree(folder)


def latest_checkpoint(run: Path, skip_corrupt_checkpoint: bool = False) -> Checkpoint | None:
    """Return the newest checkpoint of a run, or None without one.

    With `skip_corrupt_checkpoint`, a corrupt newest checkpoint is removed and the one before it is returned, if that
    one is intact. Raises CorruptCheckpoint otherwise.
    """
    folders = checkpoint_folders(run)
    if not folders:
        return None
    try:
        return load_checkpoint(folders[-1], folders[:-1])
    except CorruptCheckpoint:
        if not skip_corrupt_checkpoint or len(folders) == 1:
            raise
    previous = load_checkpoint(folders[-2], folders[:-2])
    shutil.rmtree(folders[-1])
    return previous


def load_checkpoint(folder: Path, older: Sequence[Path] = ()) -> Checkpoint:
    """Return the checkpoint in `folder`. The `older` folders are named in the advice of an error.

    Raises:
        CorruptCheckpoint: the checkpoint is damaged.
        UserError: another version of pgprune wrote it.
    """
    try:
        record = read_record(folder / CHECKPOINT_RECORD)
        if record["version"] == VERSION:
            return _checkpoint_of(folder, record)
    except (UserError, KeyError, ValueError, TypeError) as error:
        reason = (
            f"{error} is missing"
            if isinstance(error, KeyError)
            else f"{error}".replace(f"{folder}/", "").removesuffix(".")
        )
        raise CorruptCheckpoint(f"{folder}: the checkpoint is corrupt ({reason}). {_advice(older)}") from None
    raise UserError(
        f"{folder}: the checkpoint has version {record['version']}, but this pgprune reads version {VERSION}. "
        "Use the pgprune that wrote it, or start over in another directory with --out."
    )


def _advice(older: Sequence[Path]) -> str:
    if older:
        return f"To resume from {older[-1].name}, remove that directory or search with --skip-corrupt-checkpoint."
    return "Remove that directory to start the search over."


def _checkpoint_of(folder: Path, record: dict[str, Any]) -> Checkpoint:
    """Return the checkpoint of a record whose own checksum is right. Raises UserError, KeyError."""
    expected_name = checkpoint_folder(folder, record["step"]).name
    if folder.name != expected_name:
        raise UserError(f"{CHECKPOINT_RECORD} belongs to {expected_name}")
    tensors_path = folder / CHECKPOINT_TENSORS
    if not tensors_path.exists() or checksum(tensors_path) != record["state_sha256"]:
        raise UserError(f"{CHECKPOINT_TENSORS} is missing or does not match its checksum")
    kind = STATES[record["policy"]]
    values: dict[str, Any] = record | read_tensors(tensors_path)
    best = record["best"]
    return Checkpoint(
        state=kind(**{entry.name: values[entry.name] for entry in fields(kind)}),
        best=None if best is None else Best(best["step"], best["objective"], values[BEST_CENTRE]),
        bad_steps=record["bad_steps"],
        seconds=record["seconds"],
        history=Written(record["history_bytes"], record["history_sha256"]),
        identity=record["identity"],
    )
