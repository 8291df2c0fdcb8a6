"""Signals that stop a verb: what it says then, and its exit code."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from pgprune_cli import signals
from pgprune_cli.distributed import of_environment
from pgprune_cli.verbs.complain import complain


@contextmanager
def stoppable() -> Iterator[None]:
    """Signals to stop end the program with a word and its exit code, all cleaned up. A search catches its own."""

    def stop(signum: int, _: object) -> NoReturn:
        complain(signals.WORDS[signal.Signals(signum)])
        raise SystemExit(signals.exit_code(signum))

    before = {signum: signal.signal(signum, stop) for signum in signals.stopping()}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def resumable() -> Iterator[None]:
    """Turns a saved stop of a search into its exit code, and says how to go on; after any other stop, too."""
    from pgprune_cli.jobs.loop import Interrupted

    alone = of_environment().world == 1
    again = " ".join(["pgprune", *map(shlex.quote, sys.argv[1:])]) if alone else "the same torchrun command"
    try:
        yield
    except Interrupted as stopped:
        complain(f"stopped after step {stopped.step}, which is saved; to go on: {again}")
        raise typer.Exit(signals.exit_code(stopped.signum)) from None
    except SystemExit:
        complain(f"stopped; from what is saved, if anything is yet, this goes on: {again}")
        raise
