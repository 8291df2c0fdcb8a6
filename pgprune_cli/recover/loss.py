"""What a recovery minimises: how far the student's predictions are from its teacher's, after Hinton et al. 2015.

The *divergence* is KL(teacher ‖ student) of the next-token distributions (arXiv:1503.02531), in nats per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from pgprune_cli.forward.row_divergence import row_divergences

if TYPE_CHECKING:
    from pgprune_cli.recover.teacher import Targets


def divergences(logits: Tensor, targets: Targets, temperature: float = 1.0) -> Tensor:
    """Return the divergence of every prediction, `(B, T)` float32 in nats.

    logits: of the student, `(B, T, V)`, divided by `temperature` here; targets: of the teacher, at that temperature.
    The divergence is not multiplied by the square of the temperature.
    """
    tokens = None if targets.tokens is None else targets.tokens.flatten(0, 1)
    by_row = row_divergences(logits.flatten(0, 1), targets.log_probs.flatten(0, 1), tokens, temperature)
    return by_row.view(logits.shape[:2])


def hidden_errors(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the relative squared error of the residual stream, the mean over layers, `(B, T)` float32.

    student, teacher: the residual stream behind the same layers, `(B, T, hidden)` each.
    """
    errors = []
    for ours, theirs in zip(student, teacher, strict=True):
        theirs = theirs.float()
        errors.append((ours.float() - theirs).square().sum(-1) / theirs.square().sum(-1).clamp(min=1e-12))
    return torch.stack(errors).mean(0)


def text_losses(logits: Tensor, windows: Tensor) -> Tensor:
    """Return the next-token loss of every prediction, `(B, T)` float32 in nats: 0 for the last, whose token is unknown.

    logits: of the student, `(B, T, V)`; windows: `(B, T)` int64.
    """
    losses = functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    return functional.pad(losses.view(len(windows), -1), (0, 1))
