"""Read the texts in a local file: plain text, JSON lines, a JSON array or parquet, the first three also gzipped.

Every reader skips rows whose text is null or empty, and refuses rows that hold anything but text.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from pgprune_cli.errors import UserError, in_short
from pgprune_cli.storage.paths import expanded

FORMATS = (".txt", ".jsonl", ".json", ".parquet")
GZIPPED = tuple(f"{format}.gz" for format in FORMATS if format != ".parquet")
EXPECTED_FILE = f"{', '.join(FORMATS)} or .gz"
COLUMN = "text"
"""The column that is read if none is named."""

BOM = "\ufeff"
"""Windows editors begin UTF-8 files with this mark."""


@dataclass(frozen=True)
class TextFile:
    """A file with texts. column: what holds the text in each row."""

    path: Path
    column: str = COLUMN

    @property
    def format(self) -> str:
        """The suffix that says how to read the file, in lower case. "" for an unknown one."""
        name = self.path.name.lower()
        return next((format for format in (*GZIPPED, *FORMATS) if name.endswith(format)), "")


def find_file(corpus: str) -> TextFile | None:
    """Return the file that `corpus` names: a path, or a path and a column as FILE:COLUMN. None if there is none.

    A directory counts as a file here, and is refused when it is read.
    """
    if (path := expanded(corpus)).exists():
        return TextFile(path)
    name, colon, column = corpus.rpartition(":")
    path = expanded(name)
    return TextFile(path, column) if colon and column and path.is_file() else None


def texts_in(file: TextFile) -> Iterator[str]:
    """Yield the whole of a plain text file, or the text of every row. Raises UserError if the file cannot be read."""
    format = file.format.removesuffix(".gz")
    if format == ".txt":
        yield _plain_text(file)
    elif format == ".parquet":
        yield from _parquet_texts(file)
    elif format == ".json" and _is_array(file.path):
        yield from _texts_of(_array_rows(file.path), file.column, f"{file.path}")
    else:
        yield from _texts_of(_line_rows(file.path), file.column, f"{file.path}")


def values_in(file: TextFile) -> Iterator[tuple[str, Any]]:
    """Yield the place of every row, for error messages, and what its column of conversations holds, of any kind.

    Raises UserError if the file cannot be read or has no such column.
    """
    format = file.format.removesuffix(".gz")
    if format == ".parquet":
        yield from ((f"{file.path}", value) for value in _parquet_values(file, lambda _: True, "conversations"))
        return
    if format == ".txt":
        raise UserError(
            f"{file.path}: a {file.format} file has no columns, so it holds no conversations. Give a .jsonl, .json or "
            f".parquet file with a column {file.column!r}."
        )
    rows = _array_rows if format == ".json" and _is_array(file.path) else _line_rows
    for number, row in rows(file.path):
        place = f"{file.path}:{number}"
        yield place, value_of(row, file.column, place, f"{file.path}")


def value_of(row: Any, column: str, place: str, corpus: str) -> Any:
    """Return what a row holds in a column of conversations. Raises UserError, with the columns there are, without one.

    place: where the row is, for error messages; corpus: what is followed by :COLUMN to name another column.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{place}: expected an object with a conversation under the key {column!r}, not {_kind(row)}.")
    if column not in row:
        raise UserError(_no_column(place, column, row, corpus, "conversations"))
    return row[column]


def text_of(row: Any, column: str, place: str, corpus: str) -> str | None:
    """Return the text in a row, None if it is null. Raises UserError for anything else, with the columns there are.

    place: where the row is, for error messages; corpus: what is followed by :COLUMN to name another column.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{place}: expected an object with a text under the key {column!r}, not {_kind(row)}.")
    if column not in row:
        raise UserError(_no_column(place, column, row, corpus))
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{place}: {column!r} holds {_kind(text)}, not text. {_advice(row, text, corpus)}")
    return text


def _advice(row: Mapping[Any, Any], value: Any, corpus: str) -> str:
    """Return what to do about a column that holds no text."""
    advice = f"The columns are {', '.join(map(str, row))}. Name one with text: {corpus}:COLUMN."
    if isinstance(value, list | dict):
        advice += " Conversations must be turned into text first, for example with the tokenizer's chat template."
    return advice


def _no_column(place: str, column: str, columns: Iterable[Any], corpus: str, held: str = "text") -> str:
    """Return the error message about a missing column. held: what the column that is asked for should hold."""
    return (
        f"{place}: there is no column {column!r}. The columns are {', '.join(map(str, columns))}. "
        f"Name the one with the {held}: {corpus}:COLUMN."
    )


def _kind(value: Any) -> str:
    """Return what a JSON value is called."""
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a text"}
    return names.get(type(value), "an object" if isinstance(value, dict) else "a list")


# --- plain text


def _plain_text(file: TextFile) -> str:
    if file.column != COLUMN:
        raise UserError(f"{file.path}: a {file.format} file has no columns. Leave out :{file.column}.")
    with _open(file.path) as content:
        text = _decoded(content.read(), file.path, 0)
    return text.removeprefix(BOM).replace("\r\n", "\n").replace("\r", "\n")


def _decoded(content: bytes, path: Path, offset: int) -> str:
    """Return bytes as text. offset: where they are in the file."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: this is not UTF-8 text (byte {offset + error.start}).") from None


@contextmanager
def _open(path: Path) -> Iterator[BufferedIOBase]:
    """Open a file, unpacking gzip. Raises UserError if it cannot be read, also while it is read inside the `with`."""
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as content:
            yield content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: this is not a whole gzip file ({in_short(error)}). Fetch it again.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the file ({error.strerror}).") from None


# --- JSON


def _texts_of(rows: Iterable[tuple[int, Any]], column: str, path: str) -> Iterator[str]:
    """Yield the text of each row. rows: with the numbers that name them in error messages."""
    for number, row in rows:
        place = f"{path}:{number}"
        text = text_of(row, column, place, path)
        if text and any("\ud800" <= letter <= "\udfff" for letter in text):  # JSON can escape what no tokenizer takes
            raise UserError(f"{place}: the text contains an unpaired surrogate (\\ud800 to \\udfff).")
        if text:
            yield text


def _line_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of every line that is not empty.

    Only a newline ends a line: JSON allows a bare U+2028 or U+0085 inside a string.
    """
    offset = 0
    with _open(path) as content:
        for number, line in enumerate(content, 1):
            text = _decoded(line, path, offset)
            offset += len(line)
            text = text.removeprefix(BOM) if number == 1 else text
            if text.strip():
                yield number, _parsed(text, f"{path}:{number}: this line is not JSON")


def _array_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of every entry of the array that the file holds."""
    with _open(path) as content:
        text = _decoded(content.read(), path, 0)
    yield from enumerate(_parsed(text.removeprefix(BOM), f"{path}: this is not a JSON array"), 1)


def _is_array(path: Path) -> bool:
    """Return whether the content of a JSON file begins with a bracket."""
    with _open(path) as content:
        return content.read(256).removeprefix(BOM.encode()).lstrip().startswith(b"[")


def _parsed(text: str, problem: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{problem} ({error}).") from None


# --- parquet


def _parquet_texts(file: TextFile) -> Iterator[str]:
    yield from (text for text in _parquet_values(file, _holds_text, "text") if text)


def _parquet_values(file: TextFile, fits: Callable[[Any], bool], held: str) -> Iterator[Any]:
    """Yield what every row holds in the file's column. fits: whether a column of an Arrow type holds what it should.

    held: what that is, for error messages.
    """
    import pyarrow
    from pyarrow import parquet

    path, column = file.path, file.column
    try:
        table = parquet.ParquetFile(path)
        schema = table.schema_arrow
        if (found := schema.names.count(column)) > 1:
            raise UserError(f"{path}: {found} columns are called {column!r}. Rename all but one.")
        if not found:
            raise UserError(_no_column(f"{path}", column, schema.names, f"{path}", held))
        if not fits(kind := schema.field(column).type):
            raise UserError(
                f"{path}: column {column!r} holds {kind}, not {held}. The columns are {', '.join(schema.names)}. "
                f"Name one with {held}: {path}:COLUMN."
            )
        for batch in table.iter_batches(columns=[column]):
            yield from batch[column].to_pylist()
    except UnicodeDecodeError:
        raise UserError(f"{path}: column {column!r} holds bytes that are not UTF-8 text. Convert them.") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: this is not a readable parquet file ({' '.join(str(error).split())}).") from None


def _holds_text(kind: Any) -> bool:
    """Return whether values of an Arrow type are texts or null."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return any(check(kind) for check in (types.is_string, types.is_large_string, types.is_string_view, types.is_null))
