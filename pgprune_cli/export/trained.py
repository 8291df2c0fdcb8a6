"""Write an exported model again: in another format, or with weights that were trained since.

Every unit of the model is kept. The decision that made it goes along, and so does the record of every recovery.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from pgprune_cli.errors import UserError
from pgprune_cli.export.formats import FORMATS
from pgprune_cli.export.plan import Again, Options, Plan
from pgprune_cli.model.source import resolve
from pgprune_cli.run.decision import Decision
from pgprune_cli.run.layout import DECISION_MASKS, DECISION_RECORD
from pgprune_cli.run.recovery import RecoveryRecord, read_recoveries


def plan_again(
    directory: Path,
    options: Options | None = None,
    format: str = "hf",
    trained: Mapping[str, Tensor] | None = None,
    recovery: RecoveryRecord | None = None,
) -> Plan:
    """Return the plan of another export of the model in `directory`. Reads no weights.

    trained: weights that replace those of the directory, by their names in the causal model, of any floating-point
    dtype, on any device. They are written in the dtypes of the directory, and weights that are absent stay as they are.
    recovery: how they were trained.

    Raises:
        UserError: the directory lacks its decision or is damaged, or a trained weight has a name or a shape that the
            model does not have.
    """
    for name in (DECISION_RECORD, DECISION_MASKS):
        if not (directory / name).exists():
            raise UserError(
                f"{directory / name}: missing, so this is not a whole export of pgprune. Export the run again."
            )
    decision = Decision.load(directory)
    again = Again(directory.absolute(), trained or {}, recovery, read_recoveries(directory))
    return FORMATS[format].plan(resolve(str(directory.absolute())), decision, options or Options(), None, again)
