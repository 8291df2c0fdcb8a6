"""The signals that ask a program to stop, and the exit code that tells which it was."""

import signal

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
"""What a person reads of each."""


def stopping() -> list[signal.Signals]:
    """Those to be caught. A hang-up that is ignored stays so: that is what nohup asks for."""
    return [signum for signum in WORDS if (signum, signal.getsignal(signum)) != (signal.SIGHUP, signal.SIG_IGN)]


def exit_code(signum: int) -> int:
    """As shells count."""
    return 128 + signum
