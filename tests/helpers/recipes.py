"""Overrides that cut recipes down to a second."""

from __future__ import annotations

SMALL = (
    "calibration.sequences=16",
    "calibration.seqlen=16",
    "calibration.batch=2",
    "calibration.heldout=4",
    "saliency.sequences=4",
    "saliency.seqlen=32",
    "search.policy=units",
    "search.forwards=12",
    "search.samples=2",
    "search.learning_rate=0.05",
    "policy.temperature=0.3",
    "reconstruct.method=none",
    "search.checkpoint_every=100",
    "search.evaluate_every=3",
)
"""Overrides that cut the demo's recipe down to a second: six steps of the units policy, no repair."""


LAYERS_POLICY = ("search.policy=layers", "reconstruct.method=least-squares", "reconstruct.sequences=8")


COMMAND = ["/usr/bin/pgprune", "search", "demo", "--out", "a run"]
