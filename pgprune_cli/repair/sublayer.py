"""Repair of a whole sub-layer: every kept weight of a block, refitted to the output of the dense block.

Refitting the region that contains the nonlinearity is better than refitting single matrices (Wagner et al. 2025, arXiv
2510.14444). With f_W the pruned block on the weights W, x its inputs behind the already pruned layers and f the dense
block, AdamW minimises

    Σ_t w_t ‖f(x)_t − f_W(x)_t‖²        w_t as in forward/moments.py

from the closed-form repair on. The gradient is that of one block: nothing is back-propagated through the model, and the
memory is that of one block. Some windows are set aside, and the weights that are best on them are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pgprune_cli.forward.block_text import BlockRunner, BlockText
from pgprune_cli.forward.shards import Shards
from pgprune_cli.forward.states import rows_on
from pgprune_cli.repair.training import (
    Weights,
    add_gradients,
    best_of,
    compute_dtype,
    converted,
    epochs_of,
    parts,
    set_aside_and_trained,
    set_gradients,
    trained,
)

LEARNING_RATE = 4e-3
"""Largest learning rate of AdamW."""


@dataclass(frozen=True)
class SublayerFit:
    """The fit of one block.

    text: what the dense block does on the own shards; epochs: how many times it is read; seed: of the order of its
    windows. Windows are counted over all shards, except that methods of one shard get rows of `text`.
    """

    runner: BlockRunner
    text: BlockText
    shards: Shards
    epochs: int
    seed: int

    def solve(self, start: Weights) -> Weights:
        """Return weights with which the block's output is closest to that of the dense block, or `start` itself.

        start: in the dtype in which they will be stored, on the block's device. On the whole text, the error of the
        result is never above that of `start`. One window cannot be set aside from itself: then nothing is fitted.
        """
        set_aside, shards = set_aside_and_trained(self.shards.windows, self.seed)
        if not len(set_aside):
            return start
        rest = torch.cat(shards)
        everything = torch.cat([set_aside, rest])
        scale = rest.numel() / max(self.shards.total(rest, self._squared_outputs), 1e-30)

        def set_own(weights: Weights, windows: Tensor) -> None:
            self._set_gradients(weights, windows, scale / len(windows))

        steps = epochs_of(shards, self.text.inputs.shape[1], self.epochs, self.seed)
        candidates = trained(start, steps, LEARNING_RATE, set_own)
        best = best_of(start, candidates, lambda weights: self.squared_error(weights, set_aside))
        is_better = best is not start and self.squared_error(best, everything) < self.squared_error(start, everything)
        return best if is_better else start

    @torch.no_grad()
    def squared_error(self, weights: Weights, windows: Tensor) -> float:
        """Return the weighted squared error of the output, summed over the tokens of some windows `(n,)`."""
        computed = converted(weights, self._compute_dtype)

        def squared_errors(rows: Tensor) -> float:
            errors: list[float] = []
            for part in self._parts(rows):
                self._run_slices(
                    part, lambda own: errors.append(float(self._squared_errors(computed, own).double().sum()))
                )
            return sum(errors)

        return self.shards.total(windows, squared_errors)

    def _set_gradients(self, weights: Weights, windows: Tensor, scale: float) -> None:
        """Set the gradients of `scale` times the sum of the squared errors in some windows `(n,)`."""

        def add(rows: Tensor) -> None:
            with torch.enable_grad():
                computed = converted(weights, self._compute_dtype)
                output = self.runner.output(computed, self._inputs(rows))
                # The derivative of the errors by the output is known: autograd need not keep their float32 copies.
                slope = self._errors(output.detach(), rows).mul_(2 * scale * self._weights(rows)[..., None])
                gradients = torch.autograd.grad(output, list(weights.values()), slope.to(output.dtype))
            add_gradients(weights, gradients)

        set_gradients(self.shards, weights, windows, lambda rows: self._run_slices(rows, add))

    def _run_slices(self, rows: Tensor, run: Callable[[Tensor], None]) -> None:
        """Call `run` on rows `(n,)`, in parts once memory has run out."""
        self.runner.run.run_slices(len(rows), lambda part: run(rows[part]))

    def _parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        return parts(rows, self.text.inputs.shape[1])

    def _squared_errors(self, weights: Weights, rows: Tensor) -> Tensor:
        """Return the weighted squared error of every token of some rows: `(n, T)` float32."""
        errors = self._errors(self.runner.output(weights, self._inputs(rows)), rows)
        return errors.square_().sum(-1) * self._weights(rows)

    def _errors(self, output: Tensor, rows: Tensor) -> Tensor:
        """Return what an output `(n, T, hidden)` of the block on some rows differs by: the same shape, float32."""
        return output.float().sub_(rows_on(self.runner.device, self.text.outputs, rows))

    def _squared_outputs(self, rows: Tensor) -> float:
        """Return the weighted sum of squares of what the dense block writes in some rows."""
        total = 0.0
        for part in self._parts(rows):
            squares = rows_on(self.runner.device, self.text.outputs, part).float().square().sum(-1)
            total += float((squares * self._weights(part)).double().sum())
        return total

    def _inputs(self, rows: Tensor) -> Tensor:
        return rows_on(self.runner.device, self.text.inputs, rows).to(self._compute_dtype)

    def _weights(self, rows: Tensor) -> Tensor:
        return rows_on(self.runner.device, self.text.weights, rows)

    @property
    def _compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.text.inputs.dtype)
