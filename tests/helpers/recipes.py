"""Overrides that cut recipes down to a second."""

from __future__ import annotations

SMALL = (
    "calibration.windows=16",
    "calibration.seqlen=16",
    "calibration.batch=2",
    "calibration.heldout=4",
    "scores.windows=4",
    "scores.seqlen=32",
    "search.policy=units",
    "search.forward_passes=12",
    "search.masks_per_step=2",
    "search.learning_rate=0.05",
    "start.temperature=0.3",
    "repair.method=none",
    "search.checkpoint_every=100",
    "search.evaluate_every=3",
)
"""Overrides that cut the demo's recipe down to a second: six steps of the units policy, no repair."""


WIDTH_SEARCH = ("search.policy=widths", "repair.method=least-squares", "repair.windows=8")


COMMAND = ["/usr/bin/pgprune", "search", "demo", "--out", "a run"]
