"""A recovery without training: a pruned model with other weights, written as `pgprune recover` writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pgprune_cli.export.plan import Plan
from pgprune_cli.export.trained import plan_again
from pgprune_cli.model.loading import load_model
from pgprune_cli.model.source import resolve
from pgprune_cli.recipe.reader import dump, find, load
from pgprune_cli.run.layout import RECIPE_FILE, RECOVERY_RECORD
from pgprune_cli.run.provenance import record_command
from pgprune_cli.run.recovery import RecoveryRecord
from pgprune_cli.run.training_history import TrainingHistory, TrainingRow
from pgprune_cli.run.training_record import TrainingRecord
from pgprune_cli.storage.records import write_record

RECORD = RecoveryRecord(
    student="/home/me/models/pruned",
    fingerprint="f00d",
    teacher="/home/me/models/dense",
    teacher_fingerprint="beef",
    text="/home/me/text.txt",
    train="all",
    lora_rank=None,
    tokens=1000,
    steps=10,
    seconds=3.5,
    loss_before=1.25,
    loss_after=0.5,
    best_step=8,
    recipe="dtype: float32\nrecover:\n  corpus: /home/me/text.txt\n  tokens: 1000\n",
)


def write_run(run: Path, steps: int, *, finished: bool = False) -> list[TrainingRow]:
    """Write the run directory of a recovery of 10 steps with the rows of the first ones, and return these.

    The text is evaluated at every even step.
    """
    run.mkdir(parents=True)
    (run / RECIPE_FILE).write_text(dump(load(find("demo"))))
    record = TrainingRecord(
        student="models/pruned",
        fingerprint="f00d",
        teacher="demo",
        teacher_fingerprint="beef",
        text="text.txt",
        text_digest="cafe",
        settings={},
        steps=10,
        windows_per_step=8,
        processes=1,
        products="float32",
    )
    record.write(run)
    record_command(run)
    rows = [TrainingRow(0, 0, None, None, 1.25, None, None, 10**9, 1.0)]
    for step in range(1, steps + 1):
        heldout = None if step % 2 else 1.25 - step / 20
        rows.append(TrainingRow(step, 1024 * step, 1.2, 1.2 - step / 20, heldout, 1e-3, 500.0, 10**9, 2.0 * step))
    with TrainingHistory(run) as history:
        for row in rows:
            history.append(row)
    if finished:
        write_record(run / RECOVERY_RECORD, RECORD.content([]))
    return rows


def trained(directory: Path, scale: float = 0.05) -> nn.Module:
    """Return the float32 model in a directory with noise of this scale on every weight."""
    model = load_model(resolve(str(directory)), "float32", "cpu")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def write(
    pruned: Path, tensors: Mapping[str, Tensor], out: Path, format: str = "hf", record: RecoveryRecord = RECORD
) -> Plan:
    """Write a pruned model with trained weights to `out`, and return the plan."""
    plan = plan_again(pruned, None, format, tensors, record)
    plan.write(out, lambda _: None)
    return plan


def recover(pruned: Path, out: Path, **record: object) -> nn.Module:
    """Write a pruned model with trained weights to `out`, and return the trained model."""
    model = trained(pruned)
    write(pruned, model.state_dict(), out, record=replace(RECORD, **record))
    return model
