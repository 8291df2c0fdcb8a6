"""export: the decision of a finished run, replayed on the base's weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from pgprune_cli.atomic import read_json
from pgprune_cli.decision import Decision
from pgprune_cli.errors import UserError
from pgprune_cli.jobs.evaluate import EVALUATION_FILE
from pgprune_cli.loading import resolve
from pgprune_cli.progress import writing
from pgprune_cli.writers import hf, mlx
from pgprune_cli.writers.normal_form import Needs
from pgprune_cli.writers.weights import bytes_of

PLANS = {"hf": hf.plan, "mlx": mlx.plan}
"""By format. `hf.write` writes them all."""

DTYPES = ("float32", "float16", "bfloat16")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def options_of(
    dtype: str | None, shard_size: str, zero_groups: bool, kv_multiple: int, ffn_multiple: int
) -> hf.Options:
    """The options as the command line gives them. Raises UserError."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: expected {', '.join(DTYPES)}")
    size = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)B", shard_size.upper())
    if size is None or not float(size[1]):
        raise UserError(f"--shard-size {shard_size}: expected a size such as 500MB or 5GB")
    needs = Needs("every" if zero_groups else "any", kv_multiple=kv_multiple, ffn_multiple=ffn_multiple)
    return hf.Options(needs, None if dtype is None else getattr(torch, dtype), int(float(size[1]) * UNITS[size[2]]))


def plan(run: Path, options: hf.Options | None = None, format: str = "hf") -> hf.Plan:
    """What an export of the run directory `run` will be. Raises UserError as `Decision.load` and `hf.plan` do."""
    decision = Decision.load(run)
    return PLANS[format](resolve(decision.model), decision, options or hf.Options())


def export(run: Path, out: Path, options: hf.Options | None = None, quiet: bool = True, format: str = "hf") -> hf.Plan:
    """Writes the pruned model of the run directory `run` into the new directory `out`.

    What `pgprune eval RUN` measured goes into the model card. Raises UserError as `plan` and `hf.write` do.
    """
    planned = plan(run, options, format)
    evaluation = run / EVALUATION_FILE
    measured = read_json(evaluation) if evaluation.exists() else None
    with writing(f"writing {out}", planned.bytes, quiet) as on_bytes:
        hf.write(planned, out, measured, on_bytes)
    return planned


def summary(planned: hf.Plan) -> dict[str, Any]:
    """An export in numbers. `sparsity`: of the prunable parameters, padding counts as kept."""
    return {
        "model_type": planned.config["model_type"],
        "stock": planned.stock,
        "layers_before": len(planned.form.kept),
        "layers_after": len(planned.form.layers),
        "parameters_before": planned.parameters_before,
        "parameters_after": planned.parameters_after,
        "sparsity": planned.sparsity,
        "bytes": planned.bytes,
    }


def tensors(planned: hf.Plan) -> list[dict[str, Any]]:
    """Every tensor of an export, in the order of its files."""
    return [
        {
            "name": cut.name,
            "shape": list(cut.shape),
            "dtype": str(cut.dtype).removeprefix("torch."),
            "bytes": bytes_of(cut),
            "file": file,
        }
        for file, cuts in planned.files.items()
        for cut in cuts
    ]
