"""The two ways a command can fail, and the exit codes scripts rely on."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit status of the `pgprune` program."""

    OK = 0
    FAILED = 1
    BAD_INPUT = 2
    INTERRUPTED = 130
    TERMINATED = 143


class UserError(Exception):
    """What the user gave is wrong. The message is one line per fault, and is all they see (exit 2)."""


class RunError(Exception):
    """The input was fine and the run failed all the same: its message is all they see (exit 1)."""
