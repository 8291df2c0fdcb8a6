"""`training.json`: what a recovery trains, on which text, and for how long. Written before its first step."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pgprune_cli.errors import UserError
from pgprune_cli.run.layout import TRAINING_RECORD
from pgprune_cli.storage.records import read_record, refuse_newer, write_record

VERSION = 1
DIGESTS = {
    "fingerprint": "another model",
    "teacher_fingerprint": "another dense model",
    "text_digest": "another text",
}
"""What it means that a digest differs."""


@dataclass(frozen=True)
class TrainingRecord:
    """What a recovery trains. All of it must be the same when the recovery is resumed.

    student, fingerprint: the pruned model's directory and the fingerprint of its files; teacher, teacher_fingerprint:
    those of the dense model; text, text_digest: the corpus and the windows that were cut from it; settings: the
    settings of the recipe that the result depends on, by dotted key; steps: optimizer steps in all; windows_per_step:
    windows that one step trains on, over all processes; processes: how many there are; products: data type of the
    matrix products, `bfloat16` or `float32`.
    """

    student: str
    fingerprint: str
    teacher: str
    teacher_fingerprint: str
    text: str
    text_digest: str
    settings: dict[str, Any]
    steps: int
    windows_per_step: int
    processes: int
    products: str

    def write(self, run: Path) -> None:
        """Write the record into a run directory, atomically. Raises OSError."""
        write_record(run / TRAINING_RECORD, asdict(self) | {"version": VERSION})

    @classmethod
    def read(cls, run: Path) -> TrainingRecord:
        """Return the record of a run. Raises UserError if it is damaged or from a newer version of pgprune."""
        path = run / TRAINING_RECORD
        record = read_record(path)
        refuse_newer(path, record.pop("version", None), VERSION)
        try:
            return cls(**record)
        except TypeError:
            raise UserError(
                f"{path}: damaged: its keys are not those of a recovery. Remove {run} to start over."
            ) from None

    def differences(self, other: TrainingRecord) -> list[str]:
        """Return what differs from another record, as `key: ours → theirs`. Where files are does not count."""
        ours, theirs = self._compared(), other._compared()
        different = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
        return [DIGESTS.get(key, f"{key}: {ours.get(key)} → {theirs.get(key)}") for key in different]

    def _compared(self) -> dict[str, Any]:
        entries = asdict(self)
        settings: dict[str, Any] = entries.pop("settings")
        return settings | {key: value for key, value in entries.items() if key not in ("student", "teacher", "text")}
