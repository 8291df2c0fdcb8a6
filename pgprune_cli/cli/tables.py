"""The text that commands print on stdout: tables, and the last line of an export."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pgprune_cli.run.evaluation import measurements

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 10_000
"""Maximum width of a line that does not go to a terminal."""


def print_result(result: dict[str, Any], as_json: bool, text: str) -> None:
    """Print the one JSON object of `--json`, or a text for people."""
    print(json.dumps(result) if as_json else text)


def print_plan(summary: dict[str, Any], tensors: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary | {"tensors": tensors}))
        return
    rows = [
        [row["name"], row["file"], " × ".join(map(str, row["shape"])), row["dtype"], f"{row['bytes'] / 1e6:,.3f}"]
        for row in tensors
    ]
    grid(("tensor", "file", "shape", "dtype", "MB"), rows)
    print(f"would write {export_line(summary)}")


MEMORY = {
    "weights": "weights",
    "activations": "activations of a forward pass",
    "slices": "gathered weights of one block",
    "covariances": "covariances and solver of one layer",
    "block_fit": "fit of one block or of the last layers, with AdamW's state",
    "gradients": "gradients and their activations",
    "device": "peak on {device}",
    "hidden_states": "hidden states of the calibration text, and of one block, on the {where}",
    "dense_states": "hidden states for losses and the last layers, on the host",
    "written_widths": "repaired projections of one layer while they are written, and of the next",
    "repaired_weights": "repaired weights of all blocks, after the search",
    "host": "peak in host memory, in addition",
    "width_table": "on disk: repaired projections of all widths",
}


def print_estimate(estimate: dict[str, Any], as_json: bool) -> None:
    """Print what a search would take."""
    if as_json:
        print(json.dumps(estimate))
        return
    passes = estimate["forward_passes"]
    where = "device, which has room for them" if estimate["memory"]["hidden_states_on_device"] else "host"
    rows = _bytes(estimate["memory"], MEMORY, estimate | {"where": where})
    rows += [
        [f"forward passes of the {name}, {passes['tokens']:,} tokens", f"{passes[name]:,}"]
        for name in ("search", "calibration")
    ]
    rows += _placement(estimate)
    rows += [
        [f"seconds: {name} (most for {BOUNDS[phase['bound']]})", f"{phase['seconds']:,.0f}"]
        for name, phase in estimate["phases"].items()
    ]
    rows.append(["seconds of the search", f"{estimate['seconds']:,.0f}"])
    _print_estimate(rows, f"{estimate['parameters'] / 1e6:,.1f} M parameters", estimate)


BOUNDS = {
    "products": "matrix products",
    "memory": "the device's memory",
    "pcie": "copies to and from the device",
    "disk": "the disk",
    "host": "the host",
}
"""What a phase can wait for."""

FITS = {
    "whole": "yes",
    "parts": "in smaller batches, with equations solved on the CPU",
    "no": "no; the seconds are those that it would take if it did",
}


def _placement(estimate: dict[str, Any]) -> list[list[str]]:
    """Return the rows about GPUs that are not here."""
    if "placement" not in estimate:
        return []
    placed = estimate["placement"]
    count = f"{placed['processes']} × {placed['gpus']} {estimate['device']}"
    return [
        ["processes × GPUs that each of them uses", count],
        ["fits", ". ".join(filter(None, [FITS[placed["fits"]], placed["advice"]]))],
    ]


RECOVERY_MEMORY = {
    "weights": "weights, those in training in float32",
    "gradients": "gradients",
    "optimizer": "state of AdamW",
    "activations": "activations kept for the backward pass",
    "logits": "logits of both models",
    "teacher": "dense model {teacher}",
    "caching": "dense model {teacher}, before the training",
    "device": "peak on {device}",
}
DISK = {
    "cache": "on disk: cached predictions of the dense model",
    "checkpoints": "on disk: checkpoints",
    "model": "on disk: the recovered model",
}


def print_recovery_estimate(estimate: dict[str, Any], as_json: bool) -> None:
    """Print what a recovery would take."""
    if as_json:
        print(json.dumps(estimate))
        return
    rows = _bytes(estimate["memory"], RECOVERY_MEMORY, estimate) + _bytes(estimate["disk"], DISK, estimate)
    rows += [["optimizer steps", f"{estimate['steps']:,}"], ["tokens trained on", f"{estimate['tokens']:,}"]]
    rows.append(["time of the matrix products", f"{estimate['seconds']:,.0f} s"])
    trained, parameters = estimate["trained_parameters"] / 1e6, estimate["parameters"] / 1e6
    _print_estimate(rows, f"{parameters:,.1f} M parameters, {trained:,.1f} M in training", estimate)


def _bytes(amounts: dict[str, int], labels: dict[str, str], estimate: dict[str, Any]) -> list[list[str]]:
    """Return a row for every amount of bytes that is not 0."""
    return [
        [label.format(**estimate), f"{amounts[key] / 1e9:,.3f} GB"] for key, label in labels.items() if amounts[key]
    ]


def _print_estimate(rows: list[list[str]], about: str, estimate: dict[str, Any]) -> None:
    """Print the FLOPs and their rates after these rows, under the model and what is said `about` it."""
    rates = estimate["flops_per_second"]
    for name, part in estimate["flops"].items():
        rows.append([f"TFLOP: {name}", f"{sum(part.values()) / 1e12:,.3f}"])
    rows += [[f"TFLOP/s in {dtype}", f"{rate / 1e12:,.3f}"] for dtype, rate in rates.items()]
    grid((f"{estimate['model']}, {about}, {estimate['dtype']}", ""), rows, 1)
    _console().print(estimate["basis"], highlight=False)


def export_line(summary: dict[str, Any]) -> str:
    before, after = summary["parameters_before"], summary["parameters_after"]
    about = "about " if summary["estimated"] else ""
    size = f"{after / 1e6:.1f} M of {before / 1e6:.1f} M parameters, {about}{summary['bytes'] / 1e6:.1f} MB"
    counted = "not counted" if summary["again"] else "counted as kept"
    padded = f", padding {counted}" if summary["padded"] else ""
    notes = "".join(f"\nnote: {note}" for note in summary["notes"])
    return f"{summary['model']}: {size}; sparsity {summary['sparsity']:.4f}{padded}{notes}"


def grid(headings: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 2) -> None:
    """Print a table. The first `texts` columns are text, the others numbers. In a pipe, rows are never folded."""
    from rich.box import HEAVY_HEAD
    from rich.table import Table

    from pgprune_cli.recipe.strict_yaml import one_line

    console = _console()
    terminal = console.is_terminal
    table = Table(box=HEAVY_HEAD if terminal else None, pad_edge=terminal)
    for place, heading in enumerate(headings):
        table.add_column(one_line(heading), justify="left" if place < texts else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(one_line, row))  # names may come from files
    console.print(table)


def _console() -> Console:
    """Return a console that folds lines at the edge of a terminal, but not in a pipe."""
    from pgprune_cli.console.terminal import plain_console

    return plain_console(width=None if plain_console().is_terminal else PIPE_WIDTH)


def print_measured(results: list[dict[str, Any]]) -> None:
    """Print a table with a row for each measurement and a column for each model."""
    columns = [measurements(result) for result in results]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(column.get(name, "") for column in columns)] for name in names]
    grid(["", *(result["model"] for result in results)], rows, texts=1)
