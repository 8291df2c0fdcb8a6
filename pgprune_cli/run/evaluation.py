"""Read the measurements of a run, and name them for a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgprune_cli.run.layout import EVALUATION_FILE, MEASURED_FILE
from pgprune_cli.storage.records import read_record


def read_measured(run: Path) -> dict[str, Any] | None:
    """Return what `pgprune eval` measured, else what `pgprune compare` measured, else None.

    Raises:
        UserError: the file is damaged.
    """
    paths = [run / name for name in (EVALUATION_FILE, MEASURED_FILE) if (run / name).exists()]
    return read_record(paths[0]) if paths else None


def perplexity_name(row: Mapping[str, Any]) -> str:
    """Return the heading of a perplexity. Only perplexities with the same name can be compared."""
    return f"{row['corpus']} PPL, {row['seqlen']} tokens{with_bos(row['bos'])}"


def perplexity_of(loss: float) -> float:
    """Return exp of a loss in nats per token. Infinity above 709, where a float cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def with_bos(bos: bool) -> str:
    """Return what is added to the name of a measurement if its windows or prompts begin with the BOS token."""
    return ", with BOS" if bos else ""


def accuracy(row: Mapping[str, Any]) -> str:
    """Return the value of a task's row as text."""
    return "not finite" if row["value"] is None else f"{row['value']:.4f}"


def measurements(result: dict[str, Any]) -> dict[str, str]:
    """Return the measurements of a model as text, by the name of their table row."""
    cells = {"parameters": f"{result['parameters']:,}"}
    for row in result["perplexity"]:
        cells[perplexity_name(row)] = f"{row['ppl']:,.2f}"
    for row in result.get("tasks", []):
        error = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
        cells[f"{row['task']} {row['metric']}{with_bos(row['bos'])}"] = accuracy(row) + error
    if "speed" in result:
        speed = result["speed"]
        cells["prefill tokens/s"] = f"{speed['prefill_tokens_per_second']:,.0f}"
        cells["decode tokens/s"] = f"{speed['decode_tokens_per_second']:,.0f}"
        cells["weights MB"] = f"{speed['weight_bytes'] / 1e6:,.1f}"
        if speed["peak_memory_bytes"] is not None:
            cells["peak memory MB"] = f"{speed['peak_memory_bytes'] / 1e6:,.1f}"
    return cells
