"""What a recovery minimises: how far the student's predictions are from its teacher's, after Hinton et al. 2015.

The *divergence* is KL(teacher ‖ student) of the next-token distributions (arXiv:1503.02531), in nats per token. If only
the teacher's k most likely tokens are known, all others count as one more token. That is a lower bound of the full
divergence, because merging tokens never moves two distributions apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from pgprune_cli.forward.masked import SOFTMAX_ROWS

if TYPE_CHECKING:
    from pgprune_cli.recover.teacher import Targets


def divergences(logits: Tensor, targets: Targets, temperature: float = 1.0) -> Tensor:
    """Return the divergence of every prediction, `(B, T)` float32 in nats.

    logits: of the student, `(B, T, V)`, divided by `temperature` here; targets: of the teacher, at that temperature.
    The divergence is not multiplied by the square of the temperature.
    """
    rows = logits.flatten(0, 1)
    tokens = None if targets.tokens is None else targets.tokens.flatten(0, 1)
    by_row: Tensor = _Divergence.apply(rows, targets.log_probs.flatten(0, 1), tokens, temperature)
    return by_row.view(logits.shape[:2])


class _Divergence(torch.autograd.Function):
    """The divergences of rows of logits, some rows at a time in float32.

    The gradient is known with the value, student minus teacher, so the forward pass stores it in the dtype of the
    logits and no float32 tensor of all logits is ever made. One backward pass uses it up.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_probs: Tensor, tokens: Tensor | None, temperature: float) -> Tensor:
        divergences = logits.new_empty(len(logits), dtype=torch.float32)
        gradient = torch.empty_like(logits)
        # Allocated once: the pages of large tensors that come and go are new every time.
        buffers = logits.new_empty(3, min(SOFTMAX_ROWS, len(logits)), logits.shape[1], dtype=torch.float32)
        for start in range(0, len(logits), SOFTMAX_ROWS):
            rows = slice(start, start + SOFTMAX_ROWS)
            scaled, student, spare = buffers[:, : len(logits[rows])]
            torch.log_softmax(_scaled(logits[rows], temperature, scaled), -1, out=student)
            if tokens is None:
                torch.log_softmax(scaled.copy_(log_probs[rows]), -1, out=spare)
                divergences[rows], slope = _full(student, spare, scaled)
            else:
                divergences[rows], slope = _with_rest(student, log_probs[rows].float(), tokens[rows])
            gradient[rows] = slope if temperature == 1 else slope.div_(temperature)
        ctx.save_for_backward(gradient)
        return divergences

    @staticmethod
    def backward(ctx: Any, *received: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        for start in range(0, len(gradient), SOFTMAX_ROWS):  # in place, and the products in float32
            rows = slice(start, start + SOFTMAX_ROWS)
            gradient[rows] *= received[0][rows].unsqueeze(1)
        return gradient, None, None, None


def _scaled(logits: Tensor, temperature: float, out: Tensor) -> Tensor:
    """Return the logits divided by the temperature, in `out`, which is float32."""
    return out.copy_(logits) if temperature == 1 else torch.div(logits.float(), temperature, out=out)


def _full(student: Tensor, teacher: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
    """Return the divergences `(rows,)` and their gradients `(rows, V)`, from log-probabilities `(rows, V)` of both.

    All three arguments are used up. spare: of the same shape, its values do not matter.
    """
    torch.sub(teacher, student, out=spare)
    probabilities = teacher.exp_()
    divergence = spare.mul_(probabilities).sum(-1)
    return divergence, student.exp_().sub_(probabilities)


def _with_rest(student: Tensor, teacher: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The same where the teacher's log-probabilities `(rows, k)` are those of `tokens`, and all others are one more."""
    listed, slope = teacher.exp(), student.exp()
    divergence = (listed * (teacher - student.gather(-1, tokens))).sum(-1)
    if tokens.shape[-1] < student.shape[-1]:
        rest = (1 - listed.sum(-1)).clamp(min=0)
        # Summed over the other tokens themselves: 1 minus the listed ones would leave nothing but rounding errors.
        log_rest = student.scatter(-1, tokens, -torch.inf).logsumexp(-1)
        divergence += torch.xlogy(rest, rest) - rest * log_rest
        slope *= 1 - (rest.log() - log_rest).exp().unsqueeze(1)
        slope.scatter_(-1, tokens, student.gather(-1, tokens).exp())
    return divergence, slope.scatter_add_(-1, tokens, -listed)


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
