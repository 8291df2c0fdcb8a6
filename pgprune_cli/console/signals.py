"""The signals that ask a program to stop, and their exit codes."""

import signal

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
"""What the user reads after each signal."""


def stopping() -> list[signal.Signals]:
    """Return the signals to catch: not a hang-up that is ignored already, as under nohup."""
    return [signum for signum in WORDS if (signum, signal.getsignal(signum)) != (signal.SIGHUP, signal.SIG_IGN)]


def exit_code(signum: int) -> int:
    """Return the exit code that shells give to a program ended by this signal."""
    return 128 + signum
