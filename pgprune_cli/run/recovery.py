"""The record of a recovery in a model directory, `recovery.json`: how the pruned model was trained, and what for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pgprune_cli import __version__
from pgprune_cli.errors import UserError
from pgprune_cli.run.layout import RECOVERY_RECORD
from pgprune_cli.storage.records import read_record, refuse_newer

VERSION = 1


@dataclass(frozen=True)
class RecoveryRecord:
    """One recovery: what was trained, towards which model, on which text, and what that brought.

    student, fingerprint: the pruned model before it was trained; teacher, teacher_fingerprint: the dense model; text:
    as recipes name it; train: as `recover.train`; lora_rank: of the adapters, None without; tokens, steps, seconds: of
    the whole training, over all its starts; loss_before, loss_after: divergence from the teacher on held-out text, in
    nats per token; best_step: after how many steps the weights are those that were written; recipe: the resolved recipe
    as YAML.
    """

    student: str
    fingerprint: str
    teacher: str
    teacher_fingerprint: str
    text: str
    train: str
    lora_rank: int | None
    tokens: int
    steps: int
    seconds: float
    loss_before: float
    loss_after: float
    best_step: int
    recipe: str

    def content(self, earlier: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the content of `recovery.json`. earlier: the recoveries of the student itself, oldest first."""
        return asdict(self) | {"earlier": earlier, "pgprune": __version__, "version": VERSION}


def read_recoveries(directory: Path) -> list[dict[str, Any]]:
    """Return the recoveries of the model in a directory, oldest first. Empty if it was never trained.

    Raises:
        UserError: the record is damaged or from a newer version of pgprune.
    """
    path = directory / RECOVERY_RECORD
    if not path.exists():
        return []
    own = read_record(path)
    refuse_newer(path, own.get("version"), VERSION)
    try:
        return [*own.pop("earlier"), own]
    except KeyError as missing:
        raise UserError(f"{path}: damaged: {missing} is missing.") from None
