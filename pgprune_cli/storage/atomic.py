"""Write files and directories atomically: under a temporary name, then synced, then renamed."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from pgprune_cli.errors import UserError


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically: a reader or a crash sees the old file or the new one. Raises OSError."""
    with new_file(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """Yield a temporary path. Its file replaces `out` if the `with` succeeds, and is removed if it fails."""
    temporary = _temporary(out)
    make_directory(out.parent)
    _remove_leftovers(out)
    try:
        with _locked(temporary, os.O_RDWR | os.O_CREAT):
            yield temporary
            sync(temporary)
            temporary.replace(out)
        sync(out.parent)
    except OSError as error:
        raise _naming(out, temporary, error) from error
    finally:
        _remove(temporary)


@contextmanager
def scratch_file(out: Path) -> Iterator[Path]:
    """Yield the path of an empty temporary file beside `out`, for a step on the way to it. It is always removed."""
    temporary = _temporary(out).with_suffix(".scratch.tmp")
    make_directory(out.parent)
    try:
        with _locked(temporary, os.O_RDWR | os.O_CREAT):
            yield temporary
    except OSError as error:
        raise _naming(out, temporary, error) from error
    finally:
        _remove(temporary)


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary directory. It becomes `out`, which must be absent or empty, if the `with` succeeds."""
    temporary = _temporary(out)
    make_directory(out.parent)
    _remove_leftovers(out)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        with _locked(temporary, os.O_RDONLY):
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                sync(path)
            if out.exists():
                out.rmdir()
            temporary.rename(out)
        sync(out.parent)
    except OSError as error:
        raise _naming(out, temporary, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_unencodable(path: Path, option: str = "--out") -> None:
    """Raise UserError if `path`, chosen with `option`, is not UTF-8. safetensors cannot open such a file."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: this path is not UTF-8. Choose another one with {option}.") from None


def make_directory(directory: Path) -> None:
    """Create a directory and its parents, and sync each, so that they survive a power cut."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync(path.parent)


@contextmanager
def _locked(temporary: Path, flags: int) -> Iterator[None]:
    """Lock a temporary file or directory inside the `with`. The lock shows other writers that it is in use."""
    handle = os.open(temporary, flags, 0o666)
    try:
        with suppress(OSError):  # not every file system has locks
            try_lock(handle)
        yield
    finally:
        os.close(handle)


def try_lock(handle: int) -> bool:
    """Lock an open file until it is closed. Return False if another process holds the lock.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_leftovers(out: Path) -> None:
    """Remove the temporary files of killed writers of `out`, which can be as large as a model."""
    for path in out.parent.glob(f"{glob.escape(_prefix(out))}*.tmp"):
        with suppress(OSError):  # removed in the meantime, or there are no locks
            handle = os.open(path, os.O_RDONLY)
            try:
                if try_lock(handle):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(handle)


def _remove(temporary: Path) -> None:
    with suppress(OSError):  # it may not exist: then the error that prevented it is the one to report
        temporary.unlink()


def _naming(out: Path, temporary: Path, error: OSError) -> OSError:
    """Return the error with the path of `out`, if it names no file or the temporary one."""
    unnamed = error.filename is None or str(error.filename).startswith(str(temporary))
    return OSError(error.errno, error.strerror, str(out)) if unnamed and error.errno is not None else error


def _temporary(path: Path) -> Path:
    return path.with_name(f"{_prefix(path)}{os.getpid()}.tmp")


def _prefix(path: Path) -> str:
    """Return how the names of all temporary files of `path` begin.

    Names can have 255 bytes. A name that is nearly as long is replaced by its hash, so that the rest fits.
    """
    name = path.name if len(os.fsencode(path.name)) <= 200 else sha256(os.fsencode(path.name)).hexdigest()
    return f".{name}."


def sync(path: Path) -> None:
    """Sync a file, or a directory so that renames inside it survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
