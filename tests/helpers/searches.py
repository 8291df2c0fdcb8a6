"""Searches that stop in the middle, and what they leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pgprune_cli.search import loop as loops


class PowerCut(BaseException):
    """Nothing is saved."""


def cut_power() -> None:
    raise PowerCut


@contextmanager
def after_step(step: int, act: Callable[[], None]) -> Iterator[None]:
    """While inside, `act` runs when a search has just done `step` steps, in the middle of its loop."""
    original = loops._take_step

    def watched(problem, loop):
        row = original(problem, loop)
        if loop.step == step:
            act()
        return row

    loops._take_step = watched
    try:
        yield
    finally:
        loops._take_step = original
