"""A recovery without training: a pruned model with other weights, written as `pgprune recover` writes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from pgprune_cli.export.trained import write_trained
from pgprune_cli.model.loading import load_model
from pgprune_cli.model.source import resolve
from pgprune_cli.run.recovery import RecoveryRecord

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


def trained(directory: Path, scale: float = 0.05) -> nn.Module:
    """Return the float32 model in a directory with noise of this scale on every weight."""
    model = load_model(resolve(str(directory)), "float32", "cpu")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def recover(pruned: Path, out: Path, **record: object) -> nn.Module:
    """Write a pruned model with trained weights to `out`, and return the trained model."""
    model = trained(pruned)
    write_trained(pruned, model.state_dict(), replace(RECORD, **record), out, lambda _: None)
    return model
