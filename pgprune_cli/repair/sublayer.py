"""Repair of a whole sub-layer: every kept weight of a block, refitted to the output of the dense block.

Refitting the region that contains the nonlinearity is better than refitting single matrices (Wagner et al. 2025, arXiv
2510.14444). With f_W the pruned block on the weights W, x its inputs behind the already pruned layers and f the dense
block, AdamW minimises

    Σ_t w_t ‖f(x)_t − f_W(x)_t‖²        w_t as in forward/moments.py

from the closed-form repair on. The gradient is that of one block: nothing is back-propagated through the model, and the
memory is that of one block. Some windows are set aside, and the weights that are best on them are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pgprune_cli.forward.block_text import BlockRunner, BlockText

LEARNING_RATE = 4e-3
"""Largest learning rate of AdamW. It rises linearly during the first steps and then falls to 0 along a cosine."""

WARM_UP = 0.1
"""Fraction of the steps during which the learning rate rises."""

BETAS = (0.9, 0.95)
"""Decay of AdamW's running means of the gradient and of its square."""

TOKENS_PER_STEP = 1024

SET_ASIDE = 1 / 16
"""Fraction of the windows that are not trained on, to choose among the weights that a fit passes through."""

CHECKS = 4
"""How many times a fit looks at the windows set aside."""

Weights = Mapping[str, Tensor]
"""Kept weights of a block by their names inside its module."""


@dataclass(frozen=True)
class SublayerFit:
    """The fit of one block.

    text: what the dense block does; epochs: how many times it is read; seed: of the order of its windows.
    """

    runner: BlockRunner
    text: BlockText
    epochs: int
    seed: int

    def solve(self, start: Weights) -> Weights:
        """Return weights with which the block's output is closest to that of the dense block, or `start` itself.

        start: in the dtype in which they will be stored, on the block's device. On the whole text, the error of the
        result is never above that of `start`. One window cannot be set aside from itself: then nothing is fitted.
        """
        set_aside, trained = self._split()
        if not len(set_aside):
            return start
        everything = torch.cat([set_aside, trained])
        best, least = start, self.error(start, set_aside)
        for weights in self._passed_through(start, trained):
            error = self.error(weights, set_aside)
            if error < least:
                best, least = weights, error
        is_better = best is not start and self.error(best, everything) < self.error(start, everything)
        return best if is_better else start

    @torch.no_grad()
    def error(self, weights: Weights, windows: Tensor) -> float:
        """Return the squared error of the block relative to its squared output, both weighted, on some windows `(n,)`."""
        computed = self._in_compute_dtype(weights)
        errors: list[float] = []
        for part in self._parts(windows):
            self._run_slices(part, lambda own: errors.append(float(self._squared_errors(computed, own).double().sum())))
        return sum(errors) / max(sum(map(self._squared_outputs, self._parts(windows))), 1e-30)

    def _passed_through(self, start: Weights, trained: Tensor) -> Iterator[Weights]:
        """Train, and yield the weights CHECKS times, the last time at the end."""
        moved = {name: weight.to(torch.float32, copy=True).requires_grad_() for name, weight in start.items()}
        optimizer = torch.optim.AdamW(moved.values(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0, eps=1e-10)
        generator = torch.Generator().manual_seed(self.seed)
        steps = [
            part
            for _ in range(self.epochs)
            for part in self._parts(trained[torch.randperm(len(trained), generator=generator)])
        ]
        checks = {round(len(steps) * (check + 1) / CHECKS) for check in range(CHECKS)}
        scale = trained.numel() / max(sum(map(self._squared_outputs, self._parts(trained))), 1e-30)
        for step, part in enumerate(steps):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * scheduled(step, len(steps))
            self._set_gradients(moved, part, scale / len(part))
            torch.nn.utils.clip_grad_norm_(moved.values(), 1.0)
            optimizer.step()
            if step + 1 in checks:
                yield {name: weight.detach().to(start[name].dtype, copy=True) for name, weight in moved.items()}

    def _set_gradients(self, moved: Weights, windows: Tensor, scale: float) -> None:
        """Set the gradients of `scale` times the sum of the squared errors in some windows `(n,)`."""
        for weight in moved.values():
            weight.grad = None

        def add(part: Tensor) -> None:
            with torch.enable_grad():
                loss = self._squared_errors(self._in_compute_dtype(moved), part).sum() * scale
                gradients = torch.autograd.grad(loss, list(moved.values()))
            for weight, gradient in zip(moved.values(), gradients, strict=True):
                weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)

        self._run_slices(windows, add)

    def _run_slices(self, windows: Tensor, run: Callable[[Tensor], None]) -> None:
        """Call `run` on windows `(n,)`, in parts once memory has run out."""
        self.runner.run.splitter.run_slices(len(windows), lambda part: run(windows[part]))

    def _split(self) -> tuple[Tensor, Tensor]:
        """Return the windows that are set aside and those that are trained on."""
        windows = len(self.text.inputs)
        order = torch.randperm(windows, generator=torch.Generator().manual_seed(self.seed))
        count = min(max(1, int(windows * SET_ASIDE)), windows - 1)
        return order[:count], order[count:]

    @property
    def _windows_per_step(self) -> int:
        return max(1, TOKENS_PER_STEP // self.text.inputs.shape[1])

    def _parts(self, windows: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = windows.split(self._windows_per_step)
        return parts

    def _squared_errors(self, weights: Weights, windows: Tensor) -> Tensor:
        """Return the weighted squared error of every token of some windows: `(n, T)` float32, with a graph."""
        device = next(iter(weights.values())).device
        inputs = self.text.inputs[windows].to(device, self._compute_dtype)
        error = (self.runner.output(weights, inputs) - self.text.outputs[windows].to(device)).float()
        return error.square().sum(-1) * self.text.weights[windows].to(device)

    def _squared_outputs(self, windows: Tensor) -> float:
        """Return the weighted sum of squares of what the dense block writes in some windows."""
        squares = self.text.outputs[windows].float().square().sum(-1)
        return float((squares * self.text.weights[windows]).double().sum())

    @property
    def _compute_dtype(self) -> torch.dtype:
        """The dtype of the passes through the block. Gradients can be too small for float16."""
        dtype = self.text.inputs.dtype
        return torch.float32 if dtype == torch.float16 else dtype

    def _in_compute_dtype(self, weights: Weights) -> Weights:
        return {name: weight.to(self._compute_dtype) for name, weight in weights.items()}


def scheduled(step: int, steps: int) -> float:
    """Return the fraction of the largest learning rate at a step: a linear rise, then a cosine to 0."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
