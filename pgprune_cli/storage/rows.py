"""The history of a run: a file with one JSON object per line, which grows row by row and survives a crash."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self, TypeVar

from pgprune_cli.errors import UserError
from pgprune_cli.storage.atomic import sync

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Row = TypeVar("Row")


class Written(NamedTuple):
    """The part of a history that was written before a checkpoint: its length in bytes and its sha256."""

    bytes: int
    sha256: str


class RowFile:
    """A history, open for appending one row per step."""

    def __init__(self, path: Path) -> None:
        self.digest = hashlib.sha256(path.read_bytes() if path.exists() else b"")
        self.file = path.open("a", encoding="utf-8")
        sync(path.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with _naming(self.file.name):
            self.file.close()

    def append(self, row: DataclassInstance) -> None:
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


def append_line(path: Path, line: str) -> None:
    """Append a line to a file, which may be new, and sync both it and its folder to disk. Raises OSError.

    If a crash or a full disk cut the last line short, it is ended first: otherwise both lines could not be read.
    """
    with _naming(str(path)), path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())
        sync(path.parent)


def refuse_other_rows(path: Path, written: Written) -> None:
    """Raise UserError if a history does not start with what was written before a checkpoint."""
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


def cut_back(path: Path, written: Written | None) -> None:
    """Cut a history back to what was written before a checkpoint; without a checkpoint (None), remove it.

    Raises UserError if the history does not start with that.
    """
    if written is None:
        path.unlink(missing_ok=True)
        return
    refuse_other_rows(path, written)
    os.truncate(path, written.bytes)


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Return the rows written so far as instances of a dataclass, without a last line that is still being written.

    Raises:
        UserError: a line is not a row.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(kind(**json.loads(line)))
        except (ValueError, TypeError, RecursionError):  # not JSON in UTF-8, or other keys than those of a row
            raise UserError(f"{path}:{number}: damaged: not a row of the history.") from None
    return rows


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Add the path to an OSError: the system does not name the file if a write to an open one fails."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
