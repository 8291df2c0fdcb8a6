"""Which runs no other run beats: sparser, and losing less."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pgprune_cli.report.gather import Run


@dataclass(frozen=True)
class Measure:
    """One perplexity of several runs: `points` of `run`, `model`, `sparsity`, `ppl`, and whether it is `best`."""

    name: str
    points: list[dict[str, Any]]


def measures(runs: Sequence[Run]) -> list[Measure]:
    """Every perplexity that at least two finished runs have: of the same corpus, length and number of tokens.

    The held-out perplexity, of each run's own text, comes last.
    """
    finished = [run for run in runs if run.decision is not None]
    by_name: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    heldout = []
    for run in finished:
        for row in (run.measured or {}).get("perplexity", []):
            by_name.setdefault((row["corpus"], row["seqlen"], row["tokens"]), []).append(_point(run, row["ppl"]))
        if run.decision is not None and run.decision.heldout_loss is not None:
            heldout.append(_point(run, math.exp(run.decision.heldout_loss)))
    found = [
        Measure(f"{corpus} perplexity, {seqlen} tokens", points) for (corpus, seqlen, _), points in by_name.items()
    ]
    found.append(Measure("held-out perplexity", heldout))
    return [Measure(measure.name, _marked(measure.points)) for measure in found if len(measure.points) > 1]


def _point(run: Run, ppl: float) -> dict[str, Any]:
    assert run.decision is not None, "only finished runs are compared"
    return {"run": run.name, "model": run.decision.model, "sparsity": round(run.decision.sparsity, 4), "ppl": ppl}


def _marked(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [point | {"best": not any(_beats(other, point) for other in points)} for point in points]


def _beats(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Of the same model, at least as sparse and losing no more, and better in one of both."""
    a, b = (-one["sparsity"], one["ppl"]), (-other["sparsity"], other["ppl"])
    return one["model"] == other["model"] and a[0] <= b[0] and a[1] <= b[1] and a != b
