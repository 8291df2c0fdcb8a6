"""Let only one process at a time work in a run directory.

The lock is the kernel's (`flock`): it ends with its process, however the process ends, and a later process with the
same id does not hold it. The content of `.lock` names the owner for error messages only. On NFS the lock holds between
hosts if the lock service runs (with NFSv4 always). On a file system without locks, `locked` prints a warning and
continues.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from pgprune_cli.console.stderr import warn
from pgprune_cli.errors import UserError
from pgprune_cli.run.layout import LOCK_FILE, refuse_other_content
from pgprune_cli.storage.atomic import make_directory, refuse_unencodable, try_lock

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Create `run` and lock it inside the `with`. A new directory that is still empty afterwards is removed.

    Raises:
        UserError: another process holds the lock, or the path is not UTF-8.
    """
    refuse_unencodable(run)
    new = not run.exists()
    make_directory(run)
    handle = _open(run)
    try:
        yield
    finally:
        (run / LOCK_FILE).unlink(missing_ok=True)
        os.close(handle)
        if new:
            with suppress(OSError):  # not empty
                run.rmdir()


def refuse_unwritable(path: Path) -> None:
    """Raise UserError if a file or directory `path`, chosen with --out, cannot be created. Writes nothing."""
    existing = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    _refuse_unwritable(path, existing, "--out")


def refuse_unusable(run: Path, option: str = "--out") -> None:
    """Raise UserError if `run` cannot be written or created, or is no run, or if another process holds its lock.

    Writes nothing.

    option: chooses it on the command line.
    """
    existing = next(path for path in (run, *run.absolute().parents) if os.path.lexists(path))  # a broken link too
    _refuse_unwritable(run, existing, option)
    refuse_other_content(run, option)
    if (run / LOCK_FILE).exists():
        with suppress(OSError):  # released in the meantime, or no locks on this file system
            handle = os.open(run / LOCK_FILE, os.O_RDWR)
            try:
                if not try_lock(handle):
                    raise UserError(_in_use(run))
            finally:
                os.close(handle)


def _refuse_unwritable(path: Path, existing: Path, option: str) -> None:
    refuse_unencodable(path, option)
    place = f"{path}:" if existing == path else f"{path}: {existing} is"
    if not existing.is_dir():
        raise UserError(f"{place} not a directory. Choose another directory with {option}.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{place} not writable. Make it writable, or choose another directory with {option}.")


def _in_use(run: Path) -> str:
    return f"{run}: in use by {_owner(run)}. Wait for it, stop it, or choose another run directory."


def _open(run: Path) -> int:
    """Lock the lock file and return its open handle. Raise UserError if another process holds it."""
    while True:
        handle = os.open(run / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)  # less the umask, which a group may share
        try:
            if not _lock(handle, run):
                raise UserError(_in_use(run))
            if os.fstat(handle).st_nlink:
                _write_owner(handle)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its owner has just ended and removed the file


def _lock(handle: int, run: Path) -> bool:
    """Lock the file and return whether that worked. Without locks, print a warning and return True."""
    try:
        return try_lock(handle)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warn(f"{run}: no locks on this file system. Do not start a second process in this directory.")
        return True


def _write_owner(handle: int) -> None:
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat(" ", "seconds")}
    os.truncate(handle, 0)
    os.write(handle, json.dumps(owner).encode())


def _owner(run: Path) -> str:
    """Return the process that holds the lock, for an error message."""
    try:
        owner = json.loads((run / LOCK_FILE).read_text())
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it holds the lock, but has not written its name yet
        return "another process"
