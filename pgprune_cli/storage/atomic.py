"""Files that are whole or absent: written under a temporary name, synced, renamed; refused on reading when damaged."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def write_bytes(path: Path, content: bytes) -> None:
    """Puts `content` at `path` in one step: a reader, or a crash, sees the old file or the new one."""
    with new_file(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """A name beside `out` whose file replaces `out`, synced, when the `with` ends well, and else vanishes."""
    temporary = _beside(out)
    make_directory(out.parent)
    _sweep(out)
    try:
        with _held(temporary, os.O_RDWR | os.O_CREAT):
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
    make_directory(out.parent)
    _sweep(out)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        with _held(temporary, os.O_RDONLY):
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


def make_directory(directory: Path) -> None:
    """Makes it, and what is above it, so that a power cut does not take what will be in it."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


@contextmanager
def _held(temporary: Path, flags: int) -> Iterator[None]:
    """Locks a temporary file or directory, by which others know that its writer lives."""
    handle = os.open(temporary, flags, 0o666)
    try:
        with suppress(OSError):  # not every file system has locks
            take(handle)
        yield
    finally:
        os.close(handle)


def take(handle: int) -> bool:
    """Locks an open file for as long as it is open; False where another process has. Raises OSError without locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sweep(out: Path) -> None:
    """Removes what writers of `out` left that were killed; it may be as large as a model."""
    for path in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
        with suppress(OSError):  # gone already, or nobody can tell
            handle = os.open(path, os.O_RDONLY)
            try:
                if take(handle):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(handle)


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
