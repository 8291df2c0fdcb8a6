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
    """What the user gave is wrong. The message is one line per fault, and is all they see (exit 2)."""


class RunError(Exception):
    """The input was fine and the run failed all the same: its message is all they see (exit 1)."""


def in_short(error: Exception) -> str:
    """What a library's error says, in one line."""
    return " ".join(str(error).split())[:300]


def advice_on(error: OSError) -> str:
    """What to do about a file that could not be read or written: the end of a line, "" where nothing is known."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "; make room, then run the same command again"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "; make it writable for you, or choose another place"
    if error.errno in (errno.EIO, errno.ESTALE):
        return "; look after the disk, then run the same command again"
    return ""
