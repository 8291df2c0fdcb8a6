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
    RECOVERY_RECORD,
    is_recovery_run,
    run_directories,
)
from pgprune_cli.run.training_history import best_training_row, read_training_history
from pgprune_cli.run.training_record import TrainingRecord
from pgprune_cli.storage.records import read_record

State = Literal["scored", "searching", "recovering", "finished", "damaged"]


def runs_in(folder: Path) -> list[dict[str, Any]]:
    """Return a row for every run in `folder` and below it, as `--json` prints them.

    Raises UserError if there is no such directory.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory. Start a first run: pgprune search RECIPE")
    return [_row(run) for run in run_directories(folder)]


def _row(run: Path) -> dict[str, Any]:
    """Return the row of one run. `target` is the recipe's sparsity, `sparsity` the decision's; None if unknown."""
    row: dict[str, Any] = {"run": str(run), "kind": "search", "state": "scored", "fault": None}
    row |= dict.fromkeys(("model", "target", "sparsity", "step", "steps", "best_step", "heldout_loss", "bos"))
    row |= dict.fromkeys(("tokens", "divergence_before", "divergence"))
    row["perplexity"] = []
    try:
        if is_recovery_run(run):
            return row | {"kind": "recovery", "state": "recovering"} | _recovery(run)
        if (run / RECIPE_FILE).exists():
            recipe = load(run / RECIPE_FILE)
            step = _steps_done(run / METRICS_FILE)
            row |= {"state": "searching", "model": recipe.model, "target": recipe.budget.sparsity}
            row |= {"step": step, "steps": recipe.search.steps}
        if (run / DECISION_RECORD).exists() and (run / DECISION_MASKS).exists():
            record = read_record(run / DECISION_RECORD)
            row |= {"state": "finished", "sparsity": record["sparsity"], "heldout_loss": record["heldout_loss"]}
            row |= {"bos": record["bos"], "best_step": record["best_step"]}
        row["perplexity"] = (read_measured(run) or {"perplexity": []})["perplexity"]
    except (UserError, KeyError, OSError) as error:
        fault = str(error) if isinstance(error, UserError) else f"{run}: damaged ({error!r})."
        row |= {"state": "damaged", "fault": fault}
    return row


def _recovery(run: Path) -> dict[str, Any]:
    """Return what a row says about a recovery. `divergence` is the best one on held-out text, so far or in the end."""
    record, rows = TrainingRecord.read(run), read_training_history(run)
    known: dict[str, Any] = {"model": record.student, "steps": record.steps, "step": 0, "tokens": 0}
    if rows:
        known |= {"step": rows[-1].step, "tokens": rows[-1].tokens, "divergence_before": rows[0].heldout_divergence}
    if (best := best_training_row(rows)) is not None:
        known |= {"best_step": best.step, "divergence": best.heldout_divergence}
    if (run / RECOVERY_RECORD).exists():
        known |= {"state": "finished"}
    return known


def _steps_done(history: Path) -> int:
    """Return the step of the last complete row. A running search may be writing the next one.

    Raises UserError if this is not a row.
    """
    lines = history.read_bytes().split(b"\n")[:-1] if history.exists() else []
    try:
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"{history}:{len(lines)}: damaged: not a row of the history.") from None


def cells(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the rows of a table of text."""
    return ["run", "state", "model", "sparsity", "held-out loss", "perplexity by eval"], [
        [
            row["run"],
            _state(row),
            row["model"] or "",
            "" if row["sparsity"] is None else f"{row['sparsity']:.4f}",
            _heldout(row),
            ", ".join(
                f"{cell['corpus']} ({cell['seqlen']}{with_bos(cell['bos'])}) {cell['ppl']:,.2f}"
                for cell in row["perplexity"]
            ),
        ]
        for row in rows
    ]


def _heldout(row: dict[str, Any]) -> str:
    """Return the loss on held-out text; for a recovery, the divergence before and after."""
    if row["kind"] == "recovery":
        before, best = row["divergence_before"], row["divergence"]
        return "" if before is None or best is None else f"KL {before:.4f} → {best:.4f}"
    return "" if row["heldout_loss"] is None else f"{row['heldout_loss']:.4f}{with_bos(row['bos'])}"


def _state(row: dict[str, Any]) -> str:
    if row["state"] in ("searching", "recovering"):
        noun = "unfinished" if row["kind"] == "search" else "unfinished recovery"
        return f"{noun}, step {row['step']} of {row['steps']}"
    if row["kind"] == "recovery" and row["state"] == "finished":
        return f"recovered, best at step {row['best_step']} of {row['steps']}"
    best = "" if row["best_step"] is None else f", best at step {row['best_step']} of {row['steps']}"
    return f"{row['state']}{best}"
