"""Wait for what another process does. The deadline only keeps a broken test from hanging."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

DEADLINE = 200.0
"""Seconds after which a condition that never comes true fails the test."""


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Return once `condition` is true. Fails if the process ends before, or at the deadline."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert process.poll() is None, f"the process ended with exit code {process.returncode}"
        assert time.monotonic() < deadline, "the condition has never come true"
        time.sleep(0.02)


def lines_in(path: Path) -> int:
    """Return how many whole lines a file has; 0 if there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0
