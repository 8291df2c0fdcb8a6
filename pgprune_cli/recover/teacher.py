"""The teacher: what the dense model predicts on the windows of a recovery.

It is asked batch by batch, and answers from the model itself (`LiveTeacher`) or from its predictions on disk
(`CachedTeacher` in `teacher_cache.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pgprune_cli.forward.masked import LOGIT_ROWS, SOFTMAX_ROWS, last_hidden_states, residual_streams
from pgprune_cli.model.devices import fastest_dtype
from pgprune_cli.model.families import find_family
from pgprune_cli.model.loading import load_model
from pgprune_cli.model.source import Source


@dataclass(frozen=True)
class Targets:
    """What the teacher predicts on B windows of T tokens: a distribution of the next token at every position.

    log_probs: `(B, T, k)` float32, in nats, at the temperature of the recovery, of the k most likely tokens, the
    likeliest first. Those of the whole vocabulary are in order, and may be logits in the teacher's dtype instead, which
    differ by a constant at each position; tokens: the ids `(B, T, k)` int64, None for the whole vocabulary; hidden: the
    residual stream `(B, T, D)` behind the layers that were asked for, in the teacher's dtype, None if none were.
    """

    log_probs: Tensor
    tokens: Tensor | None
    hidden: list[Tensor] | None = None


class Teacher(Protocol):
    """Predicts the windows of a recovery."""

    def targets(self, windows: Tensor, rows: Tensor) -> Targets:
        """Return the targets for windows `(B, T)` int64, which are `rows` `(B,)` of the recovery's text.

        They are on the device of the windows.
        """


class LiveTeacher:
    """The dense model itself, which runs on every batch.

    model: for forward passes only; top_k: how many of the likeliest tokens are returned, 0 for the whole vocabulary;
    temperature: divides the logits; hidden: the layers behind which the residual stream is returned, ascending.
    """

    def __init__(self, model: nn.Module, top_k: int, temperature: float, hidden: Sequence[int] = ()) -> None:
        self.model = model.eval().requires_grad_(False)
        self.top_k, self.temperature, self.hidden = top_k, temperature, tuple(hidden)

    @torch.no_grad()
    def targets(self, windows: Tensor, rows: Tensor) -> Targets:
        """Return the targets for windows `(B, T)`, whatever their rows. Logits exist for some positions at a time."""
        causal: Any = self.model
        home, shape = windows.device, windows.shape
        tokens = windows.to(causal.get_input_embeddings().weight.device)
        # The student's products may be autocast around this. The teacher computes in its own dtype.
        layers = [causal.get_decoder().layers[layer] for layer in self.hidden]
        with torch.autocast(tokens.device.type, enabled=False), residual_streams(layers) as streams:
            log_probs, ids = self._likeliest(tokens) if self.top_k else (self._whole(tokens), None)
        hidden = [stream.to(home) for stream in streams]
        ids = None if ids is None else ids.view(*shape, -1).to(home)
        return Targets(log_probs.view(*shape, -1).to(home), ids, hidden or None)

    def _whole(self, tokens: Tensor) -> Tensor:
        """Return the logits `(B * T, V)` of all positions, divided by the temperature."""
        whole = torch.empty(0)
        for start, logits in self._logits(tokens):
            if start == 0:
                whole = logits.new_empty(tokens.numel(), logits.shape[1])
            torch.div(logits, self.temperature, out=whole[start : start + len(logits)])
        return whole

    def _likeliest(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the log-probabilities `(B * T, k)` and the ids `(B * T, k)` of the likeliest tokens."""
        parts = [self._predicted(logits) for _, logits in self._logits(tokens)]
        ids = [part for _, part in parts if part is not None]
        return torch.cat([part for part, _ in parts]), torch.cat(ids) if ids else None

    def _logits(self, tokens: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the logits `(rows, V)` of consecutive positions of all windows, and the first of these positions."""
        causal: Any = self.model
        family = find_family(causal.config.model_type)
        if family is None:  # any model may teach, but only a family's adapter knows what follows the head
            yield 0, causal(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
            return
        head = causal.get_output_embeddings()
        states = last_hidden_states(self.model, tokens).flatten(0, 1)
        for start in range(0, len(states), LOGIT_ROWS):
            yield start, family.finish_logits(causal.config, head(states[start : start + LOGIT_ROWS]))

    def _predicted(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the log-probabilities `(rows, k)` and the tokens `(rows, k)` for logits `(rows, V)`."""
        whole = self.top_k >= logits.shape[1]
        log_probs = logits.new_empty(len(logits), logits.shape[1] if whole else self.top_k, dtype=torch.float32)
        tokens = None if whole else torch.empty(log_probs.shape, dtype=torch.int64, device=logits.device)
        for start in range(0, len(logits), SOFTMAX_ROWS):  # few enough in float32 for the caches of a CPU
            rows = slice(start, start + SOFTMAX_ROWS)
            scaled = logits[rows].float() / self.temperature
            if tokens is None:
                torch.log_softmax(scaled, -1, out=log_probs[rows])
            else:
                likeliest, tokens[rows] = scaled.topk(self.top_k)
                log_probs[rows] = likeliest - scaled.logsumexp(-1, keepdim=True)
        return log_probs, tokens


def load_teacher(source: Source, device: str, *, beside_student: bool) -> nn.Module:
    """Load the dense model for forward passes, in bfloat16, or in float32 on a machine without instructions for it.

    device: as in recipes; beside_student: `auto` leaves the first of several GPUs to the training.

    Raises UserError if the weights or the device are not available.
    """
    return load_model(source, fastest_dtype(device), device, beside_another=beside_student)
