"""What a recovery minimises: how far the student's predictions are from its teacher's, after Hinton et al. 2015.

The *divergence* is KL(teacher ‖ student) of the next-token distributions (arXiv:1503.02531), in nats per token. If only
the teacher's k most likely tokens are known, all others count as one more token. That is a lower bound of the full
divergence, because merging tokens never moves two distributions apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from pgprune_cli.recover.teacher import Targets


def divergences(logits: Tensor, targets: Targets, temperature: float = 1.0) -> Tensor:
    """Return the divergence of every prediction, `(B, T)` float32 in nats.

    logits: of the student, `(B, T, V)`, divided by `temperature` here; targets: of the teacher, at that temperature.
    The divergence is not multiplied by the square of the temperature.
    """
    logits = logits.float() / temperature
    teacher = targets.log_probs.float()
    if targets.tokens is None:
        full: Tensor = functional.kl_div(logits.log_softmax(-1), teacher, reduction="none", log_target=True).sum(-1)
        return full
    total = logits.logsumexp(-1, keepdim=True)
    listed = teacher.exp()
    divergence: Tensor = (listed * (teacher - (logits.gather(-1, targets.tokens) - total))).sum(-1)
    if targets.tokens.shape[-1] == logits.shape[-1]:
        return divergence
    rest = (1 - listed.sum(-1)).clamp(min=0)
    # Summed over the other tokens themselves: 1 minus the listed ones would leave nothing but rounding errors.
    student_rest = logits.scatter(-1, targets.tokens, -torch.inf).logsumexp(-1) - total.squeeze(-1)
    return divergence + torch.xlogy(rest, rest) - rest * student_rest


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
    """Return the next-token loss of every prediction, `(B, T)` float32 in nats. The last one, whose token is unknown, is 0.

    logits: of the student, `(B, T, V)`; windows: `(B, T)` int64.
    """
    losses = functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    return functional.pad(losses.view(len(windows), -1), (0, 1))
