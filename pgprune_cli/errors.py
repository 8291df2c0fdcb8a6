"""The two ways a command can fail, and the exit codes scripts rely on."""

import errno
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit status of the `pgprune` program."""

    OK = 0
    FAILED = 1
    BAD_INPUT = 2
    HUNG_UP = 129
    INTERRUPTED = 130
    TERMINATED = 143


class UserError(Exception):
    """The user's input is wrong. The message, one line per fault, is all the user sees (exit 2)."""


class RunError(Exception):
    """The input is fine, but the run failed. The message is all the user sees (exit 1)."""


def in_short(error: Exception, length: int = 300) -> str:
    """Return a library's error message on one line, cut to `length` characters."""
    return " ".join(str(error).split())[:length]


def advice_on(error: OSError) -> str:
    """Return advice on a file that could not be read or written, which ends a message. "" if there is none."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ". Make room, then run the same command again."
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return ". Make it writable for you, or choose another place."
    if error.errno == errno.ENAMETOOLONG:
        return ". Choose a shorter one."
    if error.errno in (errno.EIO, errno.ESTALE):
        return ". Check the disk, then run the same command again."
    return ""
