"""Signals that stop a search or a recovery after the step it is at, so that its state can be saved."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pgprune_cli.console.signals import stopping
from pgprune_cli.distributed import Ranks


class Interrupted(Exception):  # noqa: N818  (a requested stop is not an error)
    """A signal stopped a search or a recovery, and its state is saved.

    signum: the signal; step: the last step that is saved.
    """

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(signum, step)
        self.signum = signum
        self.step = step


@contextmanager
def stop_signals(ranks: Ranks) -> Iterator[list[int]]:
    """Yield a list that will hold the signal that asks to stop. A second signal acts as it normally would.

    Not so under torchrun, which passes signals on that its processes may have received already.
    """
    caught: list[int] = []
    handlers = {signum: signal.getsignal(signum) for signum in stopping()}

    def restore() -> None:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)

    def catch(signum: int, _: FrameType | None) -> None:
        caught.append(signum)
        if ranks.world_size == 1:
            restore()

    for signum in handlers:
        signal.signal(signum, catch)
    try:
        yield caught
    finally:
        restore()
