"""Signals that stop a verb: what it says then, and its exit code."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from pgprune_cli.cli.complaints import complain
from pgprune_cli.cli.saved import Saved
from pgprune_cli.console import signals
from pgprune_cli.distributed import ranks_from_environment


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
def resumable(saved: Callable[[int | None], Saved]) -> Iterator[None]:
    """After a stop says what is saved and the command that goes on, and turns a saved stop of a search into its code.

    `saved`: finds what is; it is told the step that a search has just saved, if it has.
    """
    from pgprune_cli.search.loop import Interrupted

    alone = ranks_from_environment().world_size == 1
    again = " ".join(["pgprune", *map(shlex.quote, sys.argv[1:])]) if alone else "the same torchrun command"
    try:
        yield
    except Interrupted as stopped:
        complain(f"stopped; {saved(stopped.step).text}; to go on: {again}")
        raise typer.Exit(signals.exit_code(stopped.signum)) from None
    except SystemExit:
        found = saved(None)
        complain(f"stopped; {found.text}" + ("" if found.done else f"; to go on: {again}"))
        raise
