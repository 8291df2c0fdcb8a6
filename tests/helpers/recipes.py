"""Overrides that make a recipe run within a second."""

from __future__ import annotations

SMALL = (
    "calibration.windows=16",
    "calibration.seqlen=16",
    "calibration.batch=2",
    "calibration.heldout=4",
    "scores.windows=4",
    "scores.seqlen=32",
    "search.policy=units",
    "search.objective=loss",
    "search.forward_passes=12",
    "search.masks_per_step=2",
    "search.learning_rate=0.05",
    "start.temperature=0.3",
    "repair.method=none",
    "search.checkpoint_every=100",
    "search.evaluate_every=3",
)
"""Six steps of the unit search on the demo's recipe, without repair."""


WIDTH_SEARCH = ("search.policy=widths", "repair.method=least-squares", "repair.windows=8")


COMMAND = ["/usr/bin/pgprune", "search", "demo", "--out", "a run"]
