"""What happens when a signal stops a command: what it prints, and its exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from pgprune_cli.cli.complaints import complain
from pgprune_cli.cli.saved import NOTHING, NOTHING_NEW, SavedWork
from pgprune_cli.console import signals
from pgprune_cli.console.commands import command_line
from pgprune_cli.distributed import ranks_from_environment

_arrived: list[int] = []
"""The signals that have stopped the command. In a half-done import, SystemExit can become any other exception."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn a signal inside the `with` into a message and an exit code, after cleaning up.

    A search handles signals itself: it saves a checkpoint first.
    """

    def stop(signum: int, _: object) -> NoReturn:
        _arrived.append(signum)
        complain(signals.WORDS[signal.Signals(signum)])
        raise SystemExit(signals.exit_code(signum))

    _arrived.clear()
    handlers = {signum: signal.signal(signum, stop) for signum in signals.stopping()}
    try:
        yield
    except Exception:
        if not _arrived:
            raise
        raise SystemExit(signals.exit_code(_arrived[0])) from None
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


@contextmanager
def resumable(saved: Callable[[int | None], SavedWork]) -> Iterator[None]:
    """When a signal stops the body, print what is saved and the command that resumes it.

    saved: describes the saved work; it is called with the step that a search has just saved, or None. Raises
    typer.Exit with the signal's exit code for a search that was interrupted and saved.
    """
    from pgprune_cli.run.interruption import Interrupted

    try:
        yield
    except Interrupted as interruption:
        _print_stop(saved(interruption.step))
        raise typer.Exit(signals.exit_code(interruption.signum)) from None
    except (SystemExit, Exception):
        if _arrived:
            _print_stop(saved(None))
        raise


def _print_stop(work: SavedWork) -> None:
    text = f"stopped: {work.text}"
    if not work.complete:
        is_alone = ranks_from_environment().world_size == 1
        again = command_line("pgprune", *sys.argv[1:]) if is_alone else "the same torchrun command"
        text += f". {'Start again' if work in (NOTHING, NOTHING_NEW) else 'Resume'} with: {again}"
    complain(text)
