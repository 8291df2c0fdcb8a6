"""Write an exported model again: in another format, or with weights that were trained since.

Every unit of the model is kept. The decision that made it goes along, and so does the record of every recovery.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from pgprune_cli.errors import UserError
from pgprune_cli.export.formats import FORMATS
from pgprune_cli.export.plan import Again, Options, Plan
from pgprune_cli.model.source import resolve
from pgprune_cli.run.decision import Decision
from pgprune_cli.run.layout import DECISION_MASKS, DECISION_RECORD
from pgprune_cli.run.recovery import RecoveryRecord, read_recoveries


def write_trained(
    student: Path,
    tensors: Mapping[str, Tensor],
    recovery: RecoveryRecord,
    out: Path,
    on_bytes: Callable[[int], None],
    format: str = "hf",
    options: Options | None = None,
) -> Plan:
    """Write the model of `student`, an exported directory, with trained weights to `out`, and return the plan.

    tensors: the trained weights by their names in the student's causal model, of any floating-point dtype, on any
    device. They are written in the student's dtypes. Weights that are absent stay as they are. on_bytes: as
    `Plan.write` takes it. A failure leaves nothing at `out`.

    Raises:
        UserError: as `plan_again` and `Plan.write` do.
        RunError: the disk is too full.
    """
    plan = plan_again(student, options, format, tensors, recovery)
    plan.write(out, on_bytes)
    return plan


def plan_again(
    directory: Path,
    options: Options | None = None,
    format: str = "hf",
    trained: Mapping[str, Tensor] | None = None,
    recovery: RecoveryRecord | None = None,
) -> Plan:
    """Return the plan of another export of the model in `directory`. Reads no weights.

    trained, recovery: the weights that replace those of the directory, as `write_trained` takes them.

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
