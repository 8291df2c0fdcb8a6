"""One process at a time in a run directory: a lock of the operating system, and beside it who holds it.

The lock is the kernel's (`flock`), which goes with its process however that ends, and which no process of the same
number can seem to hold. What `.lock` says of the owner is only told to people. On NFS a lock holds between hosts where
its lock service runs (v4: always). Where a file system has none, `locked` says so and goes on.
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

from pgprune_cli.console.stderr import STDERR
from pgprune_cli.errors import UserError
from pgprune_cli.run.layout import LOCK_FILE
from pgprune_cli.storage.atomic import make_directory, take

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Makes `run` and keeps other processes out of it inside the `with`; a directory still empty then goes again.

    Raises UserError where another process is in it.
    """
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


def _open(run: Path) -> int:
    """The locked file, as an open handle."""
    while True:
        handle = os.open(run / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _taken(handle, run):
                raise UserError(
                    f"{run}: in use by {_owner(run)}; wait for it or stop it, or choose another run directory"
                )
            if os.fstat(handle).st_nlink:
                _sign(handle)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its owner was just leaving, and took the file along


def _taken(handle: int, run: Path) -> bool:
    try:
        return take(handle)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"pgprune: {run}: no locks on this file system; let no second process in", file=STDERR)
        return True


def _sign(handle: int) -> None:
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat(" ", "seconds")}
    os.truncate(handle, 0)
    os.write(handle, json.dumps(owner).encode())


def _owner(run: Path) -> str:
    try:
        owner = json.loads((run / LOCK_FILE).read_text())
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has the lock, and has not signed yet
        return "another process"
