"""How far the model that a mask leaves is from the dense model: in its predictions, and in its residual stream.

The divergence of the predictions is KL(dense ‖ pruned) of the next-token distributions. It varies less between batches
than the cross-entropy with the text does, because a token that the dense model cannot predict either costs nothing
(Týr-the-Pruner). The dense model runs once per batch, and only its hidden states are kept. Logits of both models exist
for a few hundred positions at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pgprune_cli.forward.batch_splitting import BatchSplitter
from pgprune_cli.forward.masked import SOFTMAX_ROWS, Evaluator, last_hidden_states, residual_streams
from pgprune_cli.model.masks import ModelMask, RepairedBlocks

ROWS = 256
"""Positions whose logits exist at the same time: of the dense model in float32, and of one mask."""

MASKS = 8
"""Masks whose hidden states are kept until their logits are computed: the dense logits are computed once for all."""

HIDDEN_WEIGHT = 1.0
"""Weight of the residual stream's relative squared error beside the divergence, in nats per token."""


class States(NamedTuple):
    """The hidden states of windows `(B, T)`, in the model's dtype.

    predicting: `(B · (T − 1), hidden)`, behind the final norm, of the positions that predict a token of the text;
    stream: `(B, T, hidden)` each, the residual stream behind some layers.
    """

    predicting: Tensor
    stream: tuple[Tensor, ...]

    def to(self, device: torch.device | str) -> States:
        """Return the states with all their tensors on one device."""
        return States(self.predicting.to(device), tuple(tensor.to(device) for tensor in self.stream))

    def packed(self) -> Tensor:
        """Return all states as rows of one tensor `(rows, hidden)` on the CPU."""
        return torch.cat([self.predicting.cpu(), *(tensor.cpu().flatten(0, 1) for tensor in self.stream)])

    @classmethod
    def of(cls, rows: Tensor, tokens: Tensor) -> States:
        """Return the states of `tokens` `(B, T)` from what `packed` returned."""
        windows, length = tokens.shape
        predicting, stream = rows.tensor_split([windows * (length - 1)])
        return cls(predicting, stream.unflatten(0, (-1, windows, length)).unbind())


class Values(NamedTuple):
    """What is measured of K masks, each `(K,)` float64 on the CPU, in nats per token.

    objective: what the search minimises; loss: the next-token loss.
    """

    objective: Tensor
    loss: Tensor


class Divergence:
    """Computes the divergence of a model under masks from the dense model. The model is unchanged after every call.

    hidden_weight: of the relative squared error of the residual stream behind the first, the middle and the last layer.
    """

    def __init__(self, evaluator: Evaluator, hidden_weight: float = 0.0) -> None:
        self.evaluator, self.model = evaluator, evaluator.model
        self.hidden_weight = hidden_weight
        places = stream_places(len(self.model.layers)) if hidden_weight else []
        self.layers = [self.model.layers[place] for place in places]
        self.rows = BatchSplitter()
        self.rows.max_windows = ROWS

    def packed_shape(self, tokens: Tensor) -> tuple[int, int]:
        """Return the shape of the packed states of `tokens` `(B, T)`."""
        windows, length = tokens.shape
        return windows * (length - 1) + len(self.layers) * windows * length, self.model.head.weight.shape[1]

    @torch.inference_mode()
    def dense_states(self, tokens: Tensor) -> States:
        """Return the hidden states of the dense model on `tokens` `(B, T)` int64.

        Raises RunError if memory does not suffice for one window.
        """
        dense = self.model.shape.all_kept()
        parts = [states for _, states in self._states(dense, tokens.to(self.model.device), {})]
        streams = zip(*(states.stream for states in parts), strict=True)
        return States(torch.cat([states.predicting for states in parts]), tuple(map(torch.cat, streams)))

    @torch.inference_mode()
    def values(
        self, model_masks: Sequence[ModelMask], tokens: Tensor, repaired: Sequence[RepairedBlocks], dense: States
    ) -> Values:
        """Return what K masks cost on `tokens` `(B, T)` int64, given the states of the dense model on them.

        A value that overflows is returned as it is (inf or NaN). Raises RunError if memory does not suffice.
        """
        tokens = tokens.to(self.model.device)
        results = [torch.zeros(0, 2, dtype=torch.float64)]
        for start in range(0, len(model_masks), MASKS):
            hidden_states, errors = [], []
            for index in range(start, min(start + MASKS, len(model_masks))):
                states, error = self._run(model_masks[index], tokens, repaired[index], dense)
                hidden_states.append(states)
                errors.append(error)
            means = self._against_dense(hidden_states, dense.predicting, tokens[:, 1:].flatten()).cpu()
            means[:, 0] += self.hidden_weight * torch.stack(errors).cpu()
            results.append(means)
        return Values(*torch.cat(results).unbind(1))

    def _run(
        self, model_mask: ModelMask, tokens: Tensor, repaired: RepairedBlocks, dense: States
    ) -> tuple[Tensor, Tensor]:
        """Return the predicting states of one mask, and the mean relative squared error of its residual stream."""
        parts, errors = [], []
        for windows, states in self._states(model_mask, tokens, repaired):
            parts.append(states.predicting)
            for own, reference in zip(states.stream, dense.stream, strict=True):
                errors.append(relative_error(own, reference[windows].to(own.device)))
        total = torch.zeros((), dtype=torch.float64, device=parts[0].device)
        for error in errors:
            total += error.to(total.device, non_blocking=True)
        return torch.cat(parts) if len(parts) > 1 else parts[0], total / (tokens.numel() * max(1, len(self.layers)))

    def _states(self, model_mask: ModelMask, tokens: Tensor, repaired: RepairedBlocks) -> list[tuple[slice, States]]:
        """Return the states of a mask on consecutive slices of the windows."""
        parts: list[tuple[slice, States]] = []

        def run(windows: slice) -> None:
            with self.evaluator.shrunk(model_mask, repaired) as model, residual_streams(self.layers) as stream:
                last = last_hidden_states(model, tokens[windows])
            parts.append((windows, States(last[:, :-1].reshape(-1, last.shape[-1]), tuple(stream))))

        self.evaluator.splitter.run_slices(len(tokens), run, self.evaluator.make_room)
        return parts

    def _against_dense(self, hidden_states: Sequence[Tensor], dense: Tensor, targets: Tensor) -> Tensor:
        """Return for each of K masks the mean divergence from the dense model and the mean loss: `(K, 2)` float64.

        hidden_states: the predicting states of every mask; dense: those of the dense model; targets: the next tokens.
        """
        home = hidden_states[0].device
        dense, targets = dense.to(home), targets.to(home)
        total = torch.zeros(len(hidden_states), 2, dtype=torch.float64, device=home)

        def run(rows: slice) -> None:
            reference = self._log_probabilities(dense[rows])
            buffers = reference.new_empty(2, min(SOFTMAX_ROWS, len(reference)), reference.shape[1])
            sums = [
                divergence_and_loss(reference, self._logits(states[rows]), targets[rows], buffers)
                for states in hidden_states
            ]
            total.add_(torch.stack(sums))

        self.rows.run_slices(len(dense), run, self.evaluator.make_room)
        return total / len(dense)

    def _logits(self, hidden_states: Tensor) -> Tensor:
        return self.model.family.finish_logits(self.model.config, self.model.head(hidden_states))

    def _log_probabilities(self, hidden_states: Tensor) -> Tensor:
        """Return the log-probabilities `(rows, vocabulary)` float32 of the next tokens."""
        logits = self._logits(hidden_states)
        result = logits.new_empty(logits.shape, dtype=torch.float32)
        for part, out in zip(logits.split(SOFTMAX_ROWS), result.split(SOFTMAX_ROWS), strict=True):
            torch.log_softmax(part.float(), -1, out=out)
        return result


def stream_places(layers: int) -> list[int]:
    """Return the indices of the first, the middle and the last of a number of layers, without repetition."""
    return sorted({0, layers // 2, layers - 1})


def divergence_and_loss(reference: Tensor, logits: Tensor, targets: Tensor, buffers: Tensor) -> Tensor:
    """Return the sums of KL(reference ‖ logits) and of the loss over all rows: `(2,)` float32.

    reference: log-probabilities `(rows, vocabulary)` float32; logits: the same shape, any dtype; targets: `(rows,)`;
    buffers: `(2, some rows, vocabulary)` float32, to compute in, as many rows at a time.
    """
    divergence, loss = torch.zeros(2, device=logits.device).unbind()
    size = buffers.shape[1]
    for wanted, part, part_targets in zip(reference.split(size), logits.split(size), targets.split(size), strict=True):
        probabilities, log_probabilities = buffers[:, : len(part)]
        torch.log_softmax(probabilities.copy_(part), -1, out=log_probabilities)
        loss += functional.nll_loss(log_probabilities, part_targets, reduction="sum")
        torch.exp(wanted, out=probabilities)
        divergence += probabilities.mul_(torch.sub(wanted, log_probabilities, out=log_probabilities)).sum()
    return torch.stack([divergence, loss])


def relative_error(states: Tensor, reference: Tensor) -> Tensor:
    """Return ‖h − h_ref‖² / ‖h_ref‖² summed over all tokens of `(B, T, hidden)`: a float64 scalar."""
    error = (states.float() - reference.float()).square().sum(-1)
    size = reference.float().square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (error / size).double().sum()
