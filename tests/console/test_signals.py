"""Which signals stop a program, and how it ends."""

from __future__ import annotations

import signal

import pytest

from pgprune_cli.console import signals
from pgprune_cli.errors import ExitCode


@pytest.mark.parametrize(
    ("signum", "code"),
    [
        (signal.SIGHUP, ExitCode.HUNG_UP),
        (signal.SIGINT, ExitCode.INTERRUPTED),
        (signal.SIGTERM, ExitCode.TERMINATED),
    ],
)
def test_the_exit_codes_are_those_of_shells(signum, code) -> None:
    assert signals.exit_code(signum) == code
    assert signum in signals.stopping()


def test_nohup_holds() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in signals.stopping()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.SIGHUP in signals.stopping()
