"""The tables of a report, as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from pgprune_cli.report.gather import Run
from pgprune_cli.report.recoveries import Recovery
from pgprune_cli.run.evaluation import measurements, perplexity_of, with_bos
from pgprune_cli.run.history import best_row


@dataclass(frozen=True)
class Table:
    """A table of text. If the first column needs no heading, it is ""."""

    headings: list[str]
    rows: list[list[str]]


def summary(runs: Sequence[Run | Recovery]) -> Table:
    """Return a table with a column for each run and a row for each fact that any run has."""
    return _columns(
        [run.name for run in runs],
        [_facts(run) for run in runs],
    )


def evaluation(runs: Sequence[Run | Recovery]) -> Table:
    """Return the measurements of `pgprune eval RUN` or `pgprune compare`, with a column for each run."""
    measured = [run for run in runs if isinstance(run, Run) and run.measured is not None]
    return _columns([run.name for run in measured], [measurements(run.measured or {}) for run in measured])


def commands(run: Run | Recovery) -> Table:
    """Return a table of every command that wrote into the run."""
    rows = [[note["began"], note["versions"]["pgprune"], note["command"]] for note in run.provenance]
    return Table(["began", "pgprune", "command"], rows)


def environment(runs: Sequence[Run | Recovery]) -> Table:
    """Return a table of the versions and the machine of the last command of every run."""
    return _columns([run.name for run in runs], [_environment(run.provenance[-1]) for run in runs])


def _columns(names: Sequence[str], columns: Sequence[dict[str, str]]) -> Table:
    keys = dict.fromkeys(key for column in columns for key in column)
    return Table(["", *names], [[key, *(column.get(key, "") for column in columns)] for key in keys])


def _facts(run: Run | Recovery) -> dict[str, str]:
    """Return what a column of the summary says about a run."""
    return _facts_of_recovery(run) if isinstance(run, Recovery) else _facts_of_search(run)


def _facts_of_search(run: Run) -> dict[str, str]:
    recipe, decision = run.recipe, run.decision
    quantized = "" if recipe.weight_format == "full" else f", from {recipe.weight_format} weights"
    facts = {
        "state": run.progress,
        "model": recipe.model,
        "budget": f"removes {recipe.budget.sparsity:.0%} of {recipe.budget.measure}, {recipe.budget.scope}",
        "start": f"{recipe.scores.metric}, seed {recipe.seed}",
        "search": f"{recipe.search.policy} on {recipe.search.objective}, {recipe.search.masks_per_step} masks per step",
        "repair": recipe.repair.method,
        "computed in": f"{recipe.dtype}{quantized}",
    }
    if decision is not None:
        facts["sparsity"] = f"{decision.sparsity:.4f} of the prunable parameters"
        if decision.best_step is not None:
            facts["decision"] = f"of step {decision.best_step} of {decision.steps}, the best on held-out text"
        facts["forward passes"] = (
            f"{decision.forward_passes} for the search, {decision.calibration_forward_passes} for calibration"
        )
        if decision.heldout_loss is not None:
            facts[f"held-out loss{with_bos(run.bos)}"] = _nats(decision.heldout_loss)
        if decision.dense_loss is not None:
            facts[f"held-out loss of the dense model{with_bos(run.bos)}"] = _nats(decision.dense_loss)
        if decision.phases:
            facts["seconds by phase"] = decision.seconds_by_phase()
    elif run.rows:
        facts["forward passes"] = f"{run.forward_passes[-1]} so far"
        if (best := best_row(run.rows)) is not None and best.heldout_loss is not None:
            facts[f"held-out loss{with_bos(run.bos)}"] = (
                f"{_nats(best.heldout_loss)}, the best so far, at step {best.step}"
            )
    if run.rows and run.rows[-1].step:
        facts["search time"] = _duration(run.rows[-1].seconds)
        facts["speed"] = f"{median(row.tokens_per_second for row in run.rows if row.losses):,.0f} tokens/s"
        facts["peak memory"] = f"{max(row.memory_bytes for row in run.rows) / 1e9:.1f} GB"
    return facts


def _facts_of_recovery(run: Recovery) -> dict[str, str]:
    """Return what a column of the summary says about a recovery."""
    settings, record = run.recipe.recover, run.record
    adapters = f" of rank {settings.lora_rank}" if settings.train == "lora" else ""
    compared = f"the {settings.top_k} likeliest tokens" if settings.top_k else "all tokens"
    facts = {
        "state": run.progress,
        "model": record.student,
        "dense model": f"{record.teacher}, {settings.teacher}, {compared}",
        "text": record.text,
        "trained": f"{settings.train}{adapters}",
        "computed in": record.products,
    }
    if run.rows:
        facts["tokens"] = f"{run.rows[-1].tokens:,}"
    if run.before is not None:
        facts["held-out divergence before"] = f"{run.before:.4f} nats per token"
    if run.best is not None:
        so_far = "" if run.is_finished else " so far"
        facts["held-out divergence"] = (
            f"{run.best.heldout_divergence:.4f} nats per token, the best{so_far}, at step {run.best.step}"
        )
    if speeds := [row.tokens_per_second for row in run.rows if row.tokens_per_second is not None]:
        facts["training time"] = _duration(run.rows[-1].seconds)
        facts["speed"] = f"{median(speeds):,.0f} tokens/s"
        facts["peak memory"] = f"{max(row.memory_bytes for row in run.rows) / 1e9:.1f} GB"
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
    return f"{loss:.4f} nats per token, perplexity {perplexity_of(loss):,.2f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
