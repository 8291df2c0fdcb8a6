"""export: the decision of a finished run, replayed on the base's weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pgprune_cli.atomic import read_json
from pgprune_cli.decision import Decision
from pgprune_cli.errors import UserError
from pgprune_cli.jobs.evaluate import EVALUATION_FILE
from pgprune_cli.loading import resolve
from pgprune_cli.writers import gguf, hf
from pgprune_cli.writers.hf import Written


def _silent(done: int, total: int) -> None:
    """Nobody watches."""


def export(
    run: Path,
    out: Path,
    on_shard: Callable[[int, int], None] = _silent,
    format: str = "hf",
    dtype: str | None = None,
) -> Written:
    """Writes the pruned model of the run directory `run` to `out`, which is new: a directory, or a file for `gguf`.

    `format` is hf or gguf; `dtype` that of the weights, None for the base's. What `pgprune eval RUN` measured goes
    along. `on_shard(done, total)` follows every weight file. Raises UserError as `Decision.load`, `resolve` and the
    writers do, and for a format or dtype that there is not.
    """
    if format not in ("hf", "gguf"):
        raise UserError(f"--format {format}: expected hf or gguf")
    known = gguf.DTYPES if format == "gguf" else ()
    if dtype is not None and dtype not in known:
        raise UserError(f"--dtype {dtype}: expected {', '.join(known) or 'none'} with --format {format}")
    decision = Decision.load(run)
    evaluation = run / EVALUATION_FILE
    measured = read_json(evaluation) if evaluation.exists() else None
    source = resolve(decision.model)
    if format == "gguf":
        return gguf.write(source, decision, out, measured, on_shard, dtype)
    return hf.write(source, decision, out, measured, on_shard)
