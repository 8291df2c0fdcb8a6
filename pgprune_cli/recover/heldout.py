"""The divergence on held-out text: of a student in training, and of the rounded weights that will be written."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pgprune_cli.distributed import ALONE, Ranks
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
    device = next(model.parameters()).device

    def divergence_of(batch: dict[str, Tensor]) -> Tensor:
        windows = batch["input_ids"].to(device)
        targets = teacher.targets(windows, batch["rows"])
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            logits = model(input_ids=windows, use_cache=False).logits
        return (divergences(logits, targets, settings.temperature) * batch["positions"].to(device)).sum()

    return mean_on_heldout(text, settings.batch, divergence_of)


def mean_on_heldout(
    text: RecoveryText, batch: int, divergence_of: Callable[[dict[str, Tensor]], Tensor], ranks: Ranks = ALONE
) -> float:
    """Return the mean divergence on the held-out windows, in nats per token: the same on all processes.

    batch: windows that are read at a time; divergence_of: returns the sum over the positions of a batch that count.
    """
    total, count = 0.0, 0
    for first in range(0, -(-text.heldout // batch), ranks.world_size):  # as many on every process, for FSDP
        windows = heldout_batch(text, first + ranks.rank, batch)
        total += float(divergence_of(windows))
        count += int(windows["positions"].sum())
    return ranks.sum(total) / max(ranks.sum(float(count)), 1.0)
