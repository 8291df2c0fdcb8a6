"""The work behind `pgprune export`: replay the decision of a finished run on the weights of the base model."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pgprune_cli.console.progress import SILENT, Progress
from pgprune_cli.errors import UserError
from pgprune_cli.export.checksums import CHECKSUMS_FILE, refuse_changed
from pgprune_cli.export.formats import FORMATS, refuse_other_suffix
from pgprune_cli.export.plan import Options, Plan, check_new
from pgprune_cli.export.shapes import ShapeRequirements
from pgprune_cli.export.trained import plan_again
from pgprune_cli.model.names import absolute_name
from pgprune_cli.run.base import find_base
from pgprune_cli.run.decision import Decision
from pgprune_cli.run.layout import EVALUATION_FILE
from pgprune_cli.storage.paths import expanded
from pgprune_cli.storage.records import read_record

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def options_of(
    format: str,
    *,
    dtype: str | None = None,
    shard_size: str | None = None,
    pad_empty_attention: bool = False,
    pad_kv_heads: int = 1,
    pad_ffn: int = 1,
) -> Options:
    """Return the options given on the command line. Raises UserError for those that the format does not support."""
    chosen = FORMATS[format]
    if dtype is not None and dtype not in chosen.dtypes:
        supported = ", ".join(chosen.dtypes)
        raise UserError(f"--dtype {dtype}: not supported by --format {format}. Choose one of {supported}.")
    attention: Literal["any", "every"] = "every" if pad_empty_attention else "any"
    requirements = ShapeRequirements(attention, pad_kv_heads=pad_kv_heads, pad_ffn=pad_ffn)
    if shard_size is None:
        return Options(requirements, dtype)
    if chosen.suffix:
        raise UserError(f"--shard-size {shard_size}: --format {format} writes a single file. Leave this option out.")
    size = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)B", shard_size.upper())
    if size is None or not float(size[1]):
        raise UserError(f"--shard-size {shard_size}: expected a size such as 500MB or 5GB.")
    return Options(requirements, dtype, int(float(size[1]) * UNITS[size[2]]))


def target(run: Path, out: Path | None, format: str) -> Path:
    """Return where to write the export of a run: `out`, or by default a path below `models/`.

    Raises UserError as `refuse_other_suffix`.
    """
    out = expanded(out or Path("models") / f"{run.resolve().name}{FORMATS[format].suffix}")
    refuse_other_suffix(out, format)
    return out


def plan(run: Path, options: Options | None = None, format: str = "hf", base: str | None = None) -> Plan:
    """Return the plan of an export of the run directory `run`, with the results of `pgprune eval RUN` for its card.

    `run` may be an exported model too, all of which is kept.

    base: where the base model is now, if it is not where the run says. The export then names this place.

    Raises UserError as `plan_again`, `Decision.load`, `find_base` and the format's `plan` do.
    """
    if (run / "config.json").exists():
        if base is not None:
            raise UserError(
                f"--model {base}: {run} is an exported model, whose own weights are exported. Leave this out."
            )
        return plan_again(run, options, format)
    decision = Decision.load(run)
    evaluation = run / EVALUATION_FILE
    measured = read_record(evaluation) if evaluation.exists() else None
    source = find_base(decision, run, base)
    if base is not None:
        decision = replace(decision, model=absolute_name(base))
    return FORMATS[format].plan(source, decision, options or Options(), measured)


def export(
    run: Path,
    out: Path,
    options: Options | None = None,
    *,
    format: str = "hf",
    base: str | None = None,
    progress: Progress = SILENT,
) -> Plan:
    """Write the pruned model of the run directory `run` to `out`, which must not exist, and return the plan.

    base: as `plan` takes it.

    Raises UserError as `plan` and `Plan.write` do, and for an exported model whose files changed since.
    """
    check_new(expanded(out), directory=not FORMATS[format].suffix)
    if (run / CHECKSUMS_FILE).exists():
        with progress.working(f"checking {run}"):
            refuse_changed(run)
    export_plan = plan(run, options, format, base)
    with progress.writing(f"writing {out}", export_plan.progress_bytes) as on_bytes:
        export_plan.write(out, on_bytes)
    return export_plan


def summary(export_plan: Plan, out: Path, written: bool = False) -> dict[str, Any]:
    """Return the numbers of an export. `sparsity` is that of the prunable parameters, with padding counted as kept
    unless an exported model is written `again`.

    written: whether `out` has been written, so that a size that was an estimate is known.
    """
    estimated = export_plan.estimated and not written
    return {
        "model": str(out),
        "model_type": export_plan.model_type,
        "stock": export_plan.stock,
        "layers_before": len(export_plan.shapes.kept),
        "layers_after": len(export_plan.shapes.layers),
        "parameters_before": export_plan.parameters_before,
        "parameters_after": export_plan.parameters_after,
        "sparsity": export_plan.sparsity,
        "again": export_plan.again is not None,
        "padded": export_plan.shapes.padded,
        "bytes": out.stat().st_size if export_plan.estimated and written else export_plan.bytes,
        "estimated": estimated,
        "notes": export_plan.notes,
    }


def tensors(export_plan: Plan, out: Path) -> list[dict[str, Any]]:
    """Return a row for every tensor of an export, in the order of its files."""
    rows = []
    for file, edits in export_plan.files.items():
        for edit in edits:
            dtype, size = export_plan.stored(edit)
            row = {
                "name": edit.name,
                "shape": list(edit.shape),
                "dtype": dtype,
                "bytes": size,
                "file": file or out.name,
            }
            rows.append(row)
    return rows
