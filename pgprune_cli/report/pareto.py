"""Find the runs that no other run beats in both sparsity and perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pgprune_cli.report.gather import Run
from pgprune_cli.run.evaluation import perplexity_of, with_bos


@dataclass(frozen=True)
class Measure:
    """One perplexity of several runs.

    points: dicts with `run`, `model`, `sparsity`, `ppl`, and `best`: whether no other run beats this one.
    """

    name: str
    points: list[dict[str, Any]]


def measures(runs: Sequence[Run]) -> list[Measure]:
    """Return every perplexity that at least two finished runs have for the same corpus, length and number of tokens.

    The held-out perplexity comes last. It is measured on each run's own text. Windows that begin with BOS are never
    compared with windows that do not.
    """
    finished = [run for run in runs if run.decision is not None]
    by_name: dict[tuple[str, int, bool, int], list[dict[str, Any]]] = {}
    heldout: dict[bool, list[dict[str, Any]]] = {}
    for run in finished:
        for row in (run.measured or {}).get("perplexity", []):
            key = (row["corpus"], row["seqlen"], row["bos"], row["tokens"])
            by_name.setdefault(key, []).append(_point(run, row["ppl"]))
        if run.decision is not None and run.decision.heldout_loss is not None:
            perplexity = perplexity_of(run.decision.heldout_loss)
            if math.isfinite(perplexity):  # no axis has a place for infinity
                heldout.setdefault(run.decision.bos, []).append(_point(run, perplexity))
    candidates = [
        Measure(f"{corpus} perplexity, {seqlen} tokens{with_bos(bos)}", points)
        for (corpus, seqlen, bos, _), points in by_name.items()
    ]
    candidates += [Measure(f"held-out perplexity{with_bos(bos)}", points) for bos, points in heldout.items()]
    return [Measure(measure.name, _marked(measure.points)) for measure in candidates if len(measure.points) > 1]


def _point(run: Run, ppl: float) -> dict[str, Any]:
    assert run.decision is not None, "only finished runs are compared"
    return {"run": run.name, "model": run.decision.model, "sparsity": round(run.decision.sparsity, 4), "ppl": ppl}


def _marked(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [point | {"best": not any(_beats(rival, point) for rival in points)} for point in points]


def _beats(rival: dict[str, Any], point: dict[str, Any]) -> bool:
    """Return whether `rival` has the same model, is as good in sparsity and perplexity, and better in one of them."""
    a, b = (-rival["sparsity"], rival["ppl"]), (-point["sparsity"], point["ppl"])
    return rival["model"] == point["model"] and a[0] <= b[0] and a[1] <= b[1] and a != b
