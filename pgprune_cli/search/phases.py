"""How many seconds each phase of a search takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Phase = Literal["opening", "scores", "width table", "steps", "repair"]


class Stopwatch:
    """Measures phases.

    seconds: by phase, in the order in which they first began. A phase that is timed twice has the sum.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, phase: Phase) -> Iterator[None]:
        """Add the seconds inside to a phase."""
        began = time.monotonic()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - began
