"""runs: list runs and how far they have come. Only their small files are read, so that it is fast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pgprune_cli.errors import UserError
from pgprune_cli.recipe.reader import load
from pgprune_cli.run.evaluation import read_measured, with_bos
from pgprune_cli.run.layout import (
    DECISION_MASKS,
    DECISION_RECORD,
    METRICS_FILE,
    RECIPE_FILE,
    run_directories,
)
from pgprune_cli.storage.records import read_json

State = Literal["scored", "searching", "finished", "damaged"]


def runs_in(folder: Path) -> list[dict[str, Any]]:
    """Return a row for every run in `folder` and below it, as `--json` prints them.

    Raises UserError if there is no such directory.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory. Start a first run: pgprune search RECIPE")
    return [_row(run) for run in run_directories(folder)]


def _row(run: Path) -> dict[str, Any]:
    """Return the row of one run. `target` is the recipe's sparsity, `sparsity` the decision's; None if unknown."""
    row: dict[str, Any] = {"run": str(run), "state": "scored", "fault": None}
    row |= dict.fromkeys(("model", "target", "sparsity", "step", "steps", "best_step", "heldout_loss", "bos"))
    row["perplexity"] = []
    try:
        if (run / RECIPE_FILE).exists():
            recipe = load(run / RECIPE_FILE)
            step = _steps_done(run / METRICS_FILE)
            row |= {"state": "searching", "model": recipe.model, "target": recipe.budget.sparsity}
            row |= {"step": step, "steps": recipe.search.steps}
        if (run / DECISION_RECORD).exists() and (run / DECISION_MASKS).exists():
            record = read_json(run / DECISION_RECORD)
            row |= {"state": "finished", "sparsity": record["sparsity"], "heldout_loss": record["heldout_loss"]}
            row |= {"bos": record["bos"], "best_step": record["best_step"]}
        row["perplexity"] = (read_measured(run) or {"perplexity": []})["perplexity"]
    except (UserError, KeyError, ValueError) as error:
        fault = str(error) if isinstance(error, UserError) else f"{run}: damaged ({error!r})."
        row |= {"state": "damaged", "fault": fault}
    return row


def _steps_done(history: Path) -> int:
    """Return the step of the last complete row. A running search may be writing the next one."""
    lines = history.read_text(encoding="utf-8").split("\n")[:-1] if history.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def cells(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the rows of a table of text."""
    return ["run", "state", "model", "sparsity", "held-out loss", "perplexity by eval"], [
        [
            row["run"],
            _state(row),
            row["model"] or "",
            "" if row["sparsity"] is None else f"{row['sparsity']:.4f}",
            "" if row["heldout_loss"] is None else f"{row['heldout_loss']:.4f}{with_bos(row['bos'])}",
            ", ".join(
                f"{cell['corpus']} ({cell['seqlen']}{with_bos(cell['bos'])}) {cell['ppl']:,.2f}"
                for cell in row["perplexity"]
            ),
        ]
        for row in rows
    ]


def _state(row: dict[str, Any]) -> str:
    if row["state"] == "searching":
        return f"unfinished, step {row['step']} of {row['steps']}"
    best = "" if row["best_step"] is None else f", best at step {row['best_step']} of {row['steps']}"
    return f"{row['state']}{best}"
