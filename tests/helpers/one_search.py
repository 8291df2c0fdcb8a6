"""A small search whose result must not depend on how many processes run it, and what it results in."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from helpers.recipes import SMALL
from pgprune_cli.run.checkpoint import latest_checkpoint
from pgprune_cli.run.layout import DECISION_MASKS, DECISION_RECORD, METRICS_FILE, REPAIR_FILE
from pgprune_cli.run.scores import Scores
from pgprune_cli.storage.records import read_record

SECONDS = 240
"""No test may hang: after so long its processes are killed, and it fails."""

STEPS = 5
# 3 masks a step leave one of 4 ranks without any, and 5 held-out windows make batches of 2, 2 and 1.
RECIPE = [
    *SMALL,
    "calibration.heldout=5",
    "search.masks_per_step=3",
    f"search.forward_passes={3 * STEPS}",
    "search.policy=widths",
    "search.objective=kl-hidden",
]
RECIPE += ["repair.method=sublayer", "repair.epochs=1", "repair.windows=32", "repair.sampled_windows=20"]
RECIPE += ["search.checkpoint_every=2"]
TIMING = ("seconds", "tokens_per_second", "memory_bytes")


def result_of(run: Path) -> tuple:
    """All that must not depend on the number of processes: files bit for bit, the history without its clock."""
    rows = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    history = [{key: value for key, value in row.items() if key not in TIMING} for row in rows]
    decision = read_record(run / DECISION_RECORD)
    del decision["phases"]
    actual = latest_checkpoint(run)
    scores = {name: values.tolist() for name, values in Scores.load(run).tensors.items()}
    state = {name: value.tolist() if torch.is_tensor(value) else value for name, value in vars(actual.state).items()}
    return (run / DECISION_MASKS).read_bytes(), (run / REPAIR_FILE).read_bytes(), history, decision, scores, state


def arguments(run: Path) -> list[str]:
    """Return the arguments of `pgprune search` for this search."""
    return ["demo", "--out", str(run), *(word for override in RECIPE for word in ("--set", override))]
