"""Files that are whole or absent: written under a temporary name, synced, renamed; refused on reading when damaged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgprune_cli.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def write_bytes(path: Path, content: bytes) -> None:
    """Puts `content` at `path` in one step: a reader, or a crash, sees the old file or the new one."""
    with new_file(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Like `write_bytes`, an object as indented JSON. NaN and infinity are refused: they are not JSON."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


@contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """A name beside `out` whose file replaces `out`, synced, when the `with` ends well, and else vanishes."""
    temporary = _beside(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        sync_directory(temporary)  # which does for files too
        temporary.replace(out)
        sync_directory(out.parent)
    except OSError as error:
        raise _of(out, temporary, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Likewise a directory; `out` is absent or an empty one."""
    temporary = _beside(out)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync_directory(path)
        if out.exists():
            out.rmdir()
        temporary.rename(out)
        sync_directory(out.parent)
    except OSError as error:
        raise _of(out, temporary, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _of(out: Path, temporary: Path, error: OSError) -> OSError:
    """The system's error as one of `out`, where it names no file or one that nobody asked for."""
    own = error.filename is None or str(error.filename).startswith(str(temporary))
    return OSError(error.errno, error.strerror, str(out)) if own and error.errno is not None else error


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def sync_directory(directory: Path) -> None:
    """Makes renames inside `directory` survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of ours. Raises UserError when it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises UserError when it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or not safetensors ({error})") from None


def checksum(path: Path) -> str:
    """sha256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
