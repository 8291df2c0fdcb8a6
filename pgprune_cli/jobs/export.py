"""export: the decision of a finished run, replayed on the base's weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pgprune_cli.console.progress import SILENT, Progress
from pgprune_cli.errors import UserError
from pgprune_cli.export import gguf, hf, mlx
from pgprune_cli.export.plan import DTYPES, Measured, Options, Plan, check_new
from pgprune_cli.export.shapes import ShapeRequirements
from pgprune_cli.model.source import Source, resolve
from pgprune_cli.run.decision import Decision
from pgprune_cli.run.layout import EVALUATION_FILE
from pgprune_cli.storage.records import read_record


@dataclass(frozen=True)
class Format:
    """suffix: of its name, where an export is one file."""

    plan: Callable[[Source, Decision, Options, Measured | None], Plan]
    dtypes: tuple[str, ...] = DTYPES
    suffix: str = ""


FORMATS = {"hf": Format(hf.plan), "gguf": Format(gguf.plan, gguf.DTYPES, ".gguf"), "mlx": Format(mlx.plan)}

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def options_of(
    format: str,
    dtype: str | None,
    shard_size: str | None,
    pad_empty_attention: bool,
    pad_kv_heads: int,
    pad_ffn: int,
) -> Options:
    """The options as the command line gives them. Raises UserError for what the format does not have."""
    known = FORMATS[format]
    if dtype is not None and dtype not in known.dtypes:
        raise UserError(f"--dtype {dtype}: expected {', '.join(known.dtypes)} with --format {format}")
    attention: Literal["any", "every"] = "every" if pad_empty_attention else "any"
    requirements = ShapeRequirements(attention, pad_kv_heads=pad_kv_heads, pad_ffn=pad_ffn)
    if shard_size is None:
        return Options(requirements, dtype)
    if known.suffix:
        raise UserError(f"--shard-size {shard_size}: an export with --format {format} is one file")
    size = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)B", shard_size.upper())
    if size is None or not float(size[1]):
        raise UserError(f"--shard-size {shard_size}: expected a size such as 500MB or 5GB")
    return Options(requirements, dtype, int(float(size[1]) * UNITS[size[2]]))


def target(run: Path, out: Path | None, format: str) -> Path:
    """Where an export goes that is to go to `out`.

    Raises UserError for a name that its file cannot have.
    """
    suffix = FORMATS[format].suffix
    out = out or Path("models") / f"{run.resolve().name}{suffix}"
    if suffix and out.suffix != suffix:
        raise UserError(f"--out {out}: --format {format} writes one file, whose name should end in {suffix}")
    return out


def plan(run: Path, options: Options | None = None, format: str = "hf") -> Plan:
    """What an export of the run directory `run` will be.

    What `pgprune eval RUN` measured goes along. Raises UserError as `Decision.load` and the format's `plan` do.
    """
    if (run / "config.json").exists():  # it holds a decision too, for the record, and no repair any more
        raise UserError(f"{run}: an exported model; export the run directory that it was made from")
    decision = Decision.load(run)
    evaluation = run / EVALUATION_FILE
    measured = read_record(evaluation) if evaluation.exists() else None
    return FORMATS[format].plan(resolve(decision.model), decision, options or Options(), measured)


def export(
    run: Path, out: Path, options: Options | None = None, format: str = "hf", progress: Progress = SILENT
) -> Plan:
    """Writes the pruned model of the run directory `run` as the new `out`.

    Raises UserError as `plan` and `Plan.write` do.
    """
    check_new(out.expanduser(), directory=not FORMATS[format].suffix)
    planned = plan(run, options, format)
    with progress.writing(f"writing {out}", planned.bytes) as on_bytes:
        planned.write(out, on_bytes)
    return planned


def summary(planned: Plan, out: Path) -> dict[str, Any]:
    """An export in numbers. `sparsity`: of the prunable parameters, padding counts as kept."""
    return {
        "model": str(out),
        "model_type": planned.model_type,
        "stock": planned.stock,
        "layers_before": len(planned.shapes.kept),
        "layers_after": len(planned.shapes.layers),
        "parameters_before": planned.parameters_before,
        "parameters_after": planned.parameters_after,
        "sparsity": planned.sparsity,
        "padded": planned.shapes.padded,
        "bytes": planned.bytes,
    }


def tensors(planned: Plan, out: Path) -> list[dict[str, Any]]:
    """Every tensor of an export, in the order of its files."""
    rows = []
    for file, edits in planned.files.items():
        for edit in edits:
            dtype, size = planned.stored(edit)
            row = {
                "name": edit.name,
                "shape": list(edit.shape),
                "dtype": dtype,
                "bytes": size,
                "file": file or out.name,
            }
            rows.append(row)
    return rows
