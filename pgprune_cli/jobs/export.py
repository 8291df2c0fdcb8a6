"""export: the decision of a finished run, replayed on the base's weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pgprune_cli.atomic import read_json
from pgprune_cli.decision import Decision
from pgprune_cli.jobs.evaluate import EVALUATION_FILE
from pgprune_cli.loading import resolve
from pgprune_cli.writers.hf import Written, write


def _silent(done: int, total: int) -> None:
    """Nobody watches."""


def export(run: Path, out: Path, on_shard: Callable[[int, int], None] = _silent) -> Written:
    """Writes the pruned model of the run directory `run` into the new directory `out`.

    What `pgprune eval RUN` measured goes into the model card. `on_shard(done, total)` follows every weight file.
    Raises UserError as `Decision.load`, `resolve` and `write` do.
    """
    decision = Decision.load(run)
    evaluation = run / EVALUATION_FILE
    measured = read_json(evaluation) if evaluation.exists() else None
    return write(resolve(decision.model), decision, out, measured, on_shard)
