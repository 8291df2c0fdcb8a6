"""The divergence on held-out text of the weights as they will be written, rounded to the dtype of the export."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pgprune_cli.recipe.schema import RecoverSettings
from pgprune_cli.recover.loss import divergences
from pgprune_cli.recover.schedule import heldout_batch
from pgprune_cli.recover.teacher import Teacher
from pgprune_cli.recover.texts import RecoveryText


@torch.no_grad()
def take_rounded(model: nn.Module, trained: Mapping[str, Tensor], stored: torch.dtype) -> None:
    """Give a model trained weights as a file in the dtype `stored` will hold them, in place.

    trained: by the names of the model; a tied weight may have either name.
    """
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in trained:
            parameter.copy_(trained[name].to(stored))


@torch.no_grad()
def heldout_divergence(
    model: nn.Module, text: RecoveryText, teacher: Teacher, settings: RecoverSettings, *, bfloat16: bool
) -> float:
    """Return the mean divergence on the held-out windows, in nats per token, as the training measures it.

    bfloat16: compute matrix products in bfloat16.
    """
    device, total, count = next(model.parameters()).device, 0.0, 0
    for number in range(-(-text.heldout // settings.batch)):
        batch = {name: rows.to(device) for name, rows in heldout_batch(text, number, settings.batch).items()}
        windows, positions = batch["input_ids"], batch["positions"]
        targets = teacher.targets(windows, batch["rows"])
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            logits = model(input_ids=windows, use_cache=False).logits
        total += float((divergences(logits, targets, settings.temperature) * positions).sum())
        count += int(positions.sum())
    return total / max(count, 1)
