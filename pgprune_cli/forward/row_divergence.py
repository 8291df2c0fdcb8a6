"""How far rows of predictions are from those of another model, with the gradient and without large float32 tensors.

The divergence is KL(reference ‖ own) of the next-token distributions, in nats. If only the k most likely tokens of the
reference are known, all others count as one more token. That is a lower bound of the full divergence, because merging
tokens never moves two distributions apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pgprune_cli.forward.masked import SOFTMAX_ROWS


def row_divergences(
    logits: Tensor, reference: Tensor, tokens: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """Return the divergence of every row, `(rows,)` float32 in nats.

    Args:
        logits: `(rows, vocabulary)` in any dtype, divided by `temperature` here.
        reference: log-probabilities at that temperature: `(rows, k)` float32 of the most likely tokens, or those of the
            whole vocabulary, which may also be logits in any dtype.
        tokens: the ids `(rows, k)` int64 of the most likely tokens, None for the whole vocabulary.
        temperature: the divergence is not multiplied by its square.
    """
    divergences: Tensor = _RowDivergence.apply(logits, reference, tokens, temperature)
    return divergences


class _RowDivergence(torch.autograd.Function):
    """The divergences of rows of logits, some rows at a time in float32.

    The gradient is known with the value, own minus reference, so the forward pass stores it in the dtype of the logits
    and no float32 tensor of all logits is ever made. One backward pass uses it up.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference: Tensor, tokens: Tensor | None, temperature: float) -> Tensor:
        divergences = logits.new_empty(len(logits), dtype=torch.float32)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        # Allocated once: the pages of large tensors that come and go are new every time.
        buffers = logits.new_empty(3, min(SOFTMAX_ROWS, len(logits)), logits.shape[1], dtype=torch.float32)
        for start in range(0, len(logits), SOFTMAX_ROWS):
            rows = slice(start, start + SOFTMAX_ROWS)
            scaled, own, spare = buffers[:, : len(logits[rows])]
            torch.log_softmax(_scaled(logits[rows], temperature, scaled), -1, out=own)
            if tokens is None:
                torch.log_softmax(scaled.copy_(reference[rows]), -1, out=spare)
                divergences[rows], slope = _full(own, spare, scaled)
            else:
                divergences[rows], slope = _with_rest(own, reference[rows].float(), tokens[rows])
            if gradient is not None:
                gradient[rows] = slope if temperature == 1 else slope.div_(temperature)
        if gradient is not None:
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


def _full(own: Tensor, reference: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
    """Return the divergences `(rows,)` and their gradients `(rows, V)`, from log-probabilities `(rows, V)` of both.

    All three arguments are used up. spare: of the same shape, its values do not matter.
    """
    torch.sub(reference, own, out=spare)
    probabilities = reference.exp_()
    divergence = spare.mul_(probabilities).sum(-1)
    return divergence, own.exp_().sub_(probabilities)


def _with_rest(own: Tensor, reference: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The same where the reference `(rows, k)` is known for `tokens` only, and all others are one more."""
    listed, slope = reference.exp(), own.exp()
    divergence = (listed * (reference - own.gather(-1, tokens))).sum(-1)
    if tokens.shape[-1] < own.shape[-1]:
        rest = (1 - listed.sum(-1)).clamp(min=0)
        # Summed over the other tokens themselves: 1 minus the listed ones would leave nothing but rounding errors.
        log_rest = own.scatter(-1, tokens, -torch.inf).logsumexp(-1)
        divergence += torch.xlogy(rest, rest) - rest * log_rest
        # The reference's rest, spread like that of `own`, in logarithms: a quotient of small rests would overflow.
        slope -= (own + (rest.log() - log_rest).unsqueeze(1)).exp_()
        slope.scatter_(-1, tokens, own.gather(-1, tokens).exp())
    return divergence, slope.scatter_add_(-1, tokens, -listed)
