"""Where runs lie and what their files are called. Light: for whoever only looks at runs, shell completion too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pgprune_cli.errors import UserError

RUNS_VARIABLE = "PGPRUNE_RUNS"

RECIPE_FILE = "recipe.yaml"
SCORES_FILE = "scores.safetensors"
CHECKPOINTS_FOLDER = "checkpoints"
METRICS_FILE = "metrics.jsonl"
DECISION_MASKS, DECISION_RECORD = "decision.safetensors", "decision.json"
REPAIR_FILE = "repair.safetensors"
WIDTHS_FOLDER = "widths"
"""A folder: of a search over widths, while it is not finished."""
EVALUATION_FILE = "evaluation.json"
"""By `pgprune eval RUN`."""
MEASURED_FILE = "measured.json"
"""By `pgprune compare`, of each of its runs."""


def runs_folder() -> Path:
    """Where runs go that are not told where to: $PGPRUNE_RUNS, or `runs`."""
    return Path(os.environ.get(RUNS_VARIABLE) or "runs")


def is_run(folder: Path) -> bool:
    """Whether a directory is a run's, begun or finished. An exported model, which holds a decision too, is none."""
    return (
        any((folder / name).exists() for name in (RECIPE_FILE, SCORES_FILE)) and not (folder / "config.json").exists()
    )


def run_directories(folder: Path) -> Iterator[Path]:
    """Every run in a folder and below it, in the order of their names. A folder that is a run holds no others."""
    if is_run(folder):
        yield folder
        return
    for below in sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ():
        if not below.name.startswith("."):
            yield from run_directories(below)


def refuse_unfinished(run: Path) -> None:
    """Raises UserError for what is no run, and for a run without a decision: it says which, and what would help."""
    if all((run / name).exists() for name in (DECISION_MASKS, DECISION_RECORD)):
        return
    if (run / RECIPE_FILE).exists():
        again = f"pgprune search {run / RECIPE_FILE} --out {run}"
        raise UserError(f"{run}: its search is not finished, there is no decision yet; to go on: {again}")
    if is_run(run):
        raise UserError(f"{run}: only scored so far; `pgprune search RECIPE --out {run}` makes the decision")
    what = "holds no run" if run.is_dir() else "no such run directory"
    raise UserError(f"{run}: {what}; `pgprune runs` lists those there are")


REPORT_FILE = "report.html"


LOCK_FILE = ".lock"


PROVENANCE_FILE = "provenance.jsonl"


COSTS_FILE = "costs.json"


TENSORBOARD_FOLDER = "tensorboard"
"""The folder of a run that TensorBoard reads."""


COMPARISON_RECORD, COMPARISON_TABLE = "comparison.json", "comparison.md"
