"""What a report says in words: tables of text."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from pgprune_cli.report.gather import Run
from pgprune_cli.run.evaluation import measurements


@dataclass(frozen=True)
class Table:
    """Headings (none where the first column says it all), and rows as wide."""

    headings: list[str]
    rows: list[list[str]]


def summary(runs: Sequence[Run]) -> Table:
    """A column for each run, a row for each fact that any of them has."""
    return _columns([run.name for run in runs], [_facts(run) for run in runs])


def evaluation(runs: Sequence[Run]) -> Table:
    """What `pgprune eval RUN` or `pgprune compare` measured, likewise."""
    measured = [run for run in runs if run.measured is not None]
    return _columns([run.name for run in measured], [measurements(run.measured or {}) for run in measured])


def commands(run: Run) -> Table:
    """Every command that wrote into the run."""
    rows = [[note["began"], note["versions"]["pgprune"], note["command"]] for note in run.provenance]
    return Table(["began", "pgprune", "command"], rows)


def again(run: Run) -> str:
    """The command that does the search again, from the resolved recipe."""
    words = ["pgprune", "search", str(run.directory / "recipe.yaml"), "--out", f"{run.directory}-again"]
    return shlex.join(words)


def environment(runs: Sequence[Run]) -> Table:
    """Versions and machine of the last command of every run."""
    noted = [run for run in runs if run.provenance]
    return _columns([run.name for run in noted], [_environment(run.provenance[-1]) for run in noted])


def _columns(names: Sequence[str], columns: Sequence[dict[str, str]]) -> Table:
    keys = dict.fromkeys(key for column in columns for key in column)
    return Table(["", *names], [[key, *(column.get(key, "") for column in columns)] for key in keys])


def _facts(run: Run) -> dict[str, str]:
    recipe, decision = run.recipe, run.decision
    budget, search = recipe["budget"], recipe["search"]
    weights = recipe.get("weight_format", "full")  # which runs of before have not
    facts = {
        "state": run.progress,
        "model": str(recipe["model"]),
        "budget": f"{budget['sparsity']:.0%} of {budget['measure']} go, {budget['scope']}",
        "start": f"{recipe['scores']['metric']}, seed {recipe['seed']}",
        "search": f"over {search['policy']}, {search['masks_per_step']} samples a step",
        "repair": str(recipe["repair"]["method"]),
        "computed in": str(recipe["dtype"]) + (f", from {weights} weights" if weights != "full" else ""),
    }
    if decision is not None:
        facts["sparsity"] = f"{decision.sparsity:.4f} of the prunable parameters"
        facts["forward passes"] = (
            f"{decision.forward_passes} of search, {decision.calibration_forward_passes} of scoring and repair"
        )
        if decision.heldout_loss is not None:
            facts["held-out loss"] = _nats(decision.heldout_loss)
        if decision.dense_loss is not None:
            facts["of the dense model"] = _nats(decision.dense_loss)
    elif run.rows:
        facts["forward passes"] = f"{run.forward_passes[-1]} so far"
        judged = [row.heldout_loss for row in run.rows if row.heldout_loss is not None]
        if judged:
            facts["held-out loss"] = f"{_nats(judged[-1])}, so far"
    if run.rows:
        facts["time of the search"] = _duration(run.rows[-1].seconds)
        facts["speed"] = f"{median(row.tokens_per_second for row in run.rows):,.0f} tokens/s"
        facts["memory"] = f"{max(row.memory_bytes for row in run.rows) / 1e9:.1f} GB"
    return facts


def _environment(note: dict[str, Any]) -> dict[str, str]:
    machine = note["machine"]
    return {
        **note["versions"],
        "system": machine["system"],
        "processor": f"{machine['processor']}, {machine['threads']} threads",
        "memory": f"{machine['memory_bytes'] / 2**30:.0f} GiB",
        "accelerators": ", ".join(machine["accelerators"]) or "none",
    }


def _nats(loss: float) -> str:
    return f"{loss:.4f} nats per token, perplexity {math.exp(loss):,.2f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
