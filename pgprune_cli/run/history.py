"""`metrics.jsonl`: what a search says of itself, a row a step."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from pgprune_cli.errors import UserError
from pgprune_cli.run.layout import METRICS_FILE
from pgprune_cli.storage.atomic import sync_directory


@dataclass(frozen=True)
class Row:
    """One row of `metrics.jsonl`: a step of the search. Losses are nats per token; a bad loss is None.

    kept: where the decision of the moment was judged on held-out text, how many units of every layer it keeps, by
    family; rows of before this was recorded have none.
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
    kept: dict[str, list[int]] | None = None

    @property
    def mean_loss(self) -> float | None:
        good = [loss for loss in self.losses if loss is not None]
        return sum(good) / len(good) if good else None


class Written(NamedTuple):
    """What of `metrics.jsonl` a checkpoint goes with: its first `bytes`, and their sha256."""

    bytes: int
    sha256: str


class History:
    """`metrics.jsonl`, open to grow by one row a step."""

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
        """Raises OSError."""
        line = json.dumps(asdict(row), allow_nan=False) + "\n"
        with _naming(self.file.name):
            self.file.write(line)
            self.file.flush()
        self.digest.update(line.encode())

    def flush(self) -> Written:
        """Makes all rows durable."""
        with _naming(self.file.name):
            self.file.flush()
            os.fsync(self.file.fileno())
            return Written(self.file.tell(), self.digest.hexdigest())


def refuse_other_history(run: Path, written: Written) -> None:
    """Raises UserError where the history of a run is not what was written before its checkpoint."""
    path = run / METRICS_FILE
    content = path.read_bytes() if path.exists() else b""
    if len(content) < written.bytes:
        raise UserError(f"{path}: {len(content)} bytes where the checkpoint wrote {written.bytes}: it was cut")
    if hashlib.sha256(content[: written.bytes]).hexdigest() != written.sha256:
        raise UserError(
            f"{path}: damaged: not what was written; put it back, or remove the run directory to start over"
        )


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """The system names no file when a write to an open one fails."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error


def read_history(run: Path) -> list[Row]:
    """The rows written so far; a last line that is still being written is left out.

    Raises UserError for a line that is no row.
    """
    path = run / METRICS_FILE
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    try:
        return [Row(**json.loads(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged, or not a history of pgprune ({error})") from None
