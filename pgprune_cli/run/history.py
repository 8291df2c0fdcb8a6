"""`metrics.jsonl`: the history of a search, one row per step, and one for the start."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from pgprune_cli.errors import UserError
from pgprune_cli.run.layout import METRICS_FILE
from pgprune_cli.storage.atomic import sync_directory


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


def best_row(rows: Iterable[Row]) -> Row | None:
    """Return the row of the decision with the lowest objective on held-out text, None before the first evaluation."""
    evaluated = [row for row in rows if row.heldout_objective is not None]
    return min(evaluated, key=lambda row: row.heldout_objective or 0.0, default=None)


class Written(NamedTuple):
    """The part of `metrics.jsonl` that was written before a checkpoint: its length in bytes and its sha256."""

    bytes: int
    sha256: str


class History:
    """`metrics.jsonl`, open for appending one row per step."""

    def __init__(self, run: Path) -> None:
        path = run / METRICS_FILE
        self.digest = hashlib.sha256(path.read_bytes() if path.exists() else b"")
        self.file = path.open("a", encoding="utf-8")
        sync_directory(run)

    def __enter__(self) -> History:
        return self

    def __exit__(self, *_: object) -> None:
        with _naming(self.file.name):
            self.file.close()

    def append(self, row: Row) -> None:
        """Write one row. Raises OSError."""
        line = json.dumps(asdict(row), allow_nan=False) + "\n"
        with _naming(self.file.name):
            self.file.write(line)
            self.file.flush()
        self.digest.update(line.encode())

    def flush(self) -> Written:
        """Sync all rows to disk and return what has been written. Raises OSError."""
        with _naming(self.file.name):
            self.file.flush()
            os.fsync(self.file.fileno())
            return Written(self.file.tell(), self.digest.hexdigest())


def refuse_other_history(run: Path, written: Written) -> None:
    """Raise UserError if the history of a run does not start with what was written before its checkpoint."""
    path = run / METRICS_FILE
    content = path.read_bytes() if path.exists() else b""
    if len(content) < written.bytes:
        raise UserError(
            f"{path}: damaged: it has {len(content)} bytes, but had {written.bytes} when the checkpoint was written. "
            "Restore it, or remove the run directory to start over."
        )
    if hashlib.sha256(content[: written.bytes]).hexdigest() != written.sha256:
        raise UserError(
            f"{path}: damaged: it does not match its checksum. Restore it, or remove the run directory to start over."
        )


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Add the path to an OSError: the system does not name the file if a write to an open one fails."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error


def read_history(run: Path) -> list[Row]:
    """Return the rows written so far, without a last line that is still being written.

    Raises:
        UserError: a line is not a row.
    """
    path = run / METRICS_FILE
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(Row(**json.loads(line)))
        except (ValueError, TypeError):  # not JSON, or other keys than those of a row
            raise UserError(f"{path}:{number}: damaged: not a row of the history.") from None
    return rows
