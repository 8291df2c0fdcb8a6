"""Second moments of what the output projections read, the raw material of the `obs` metric and of every repair.

A token counts by 1 / ‖its residual stream‖²: what follows is normalised, and the attention sinks, a thousand times as
large as other tokens, would be all that counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pgprune_cli.arch import Shape
from pgprune_cli.streaming import Stream, Watch


@dataclass(frozen=True)
class Moments:
    """Of the inputs of one output projection, weighted means over tokens: second `(in, in)`, first `(in,)`, float64.

    weight: the tokens' mean weight, a float64 scalar; times it, an error is relative to the residual stream.
    """

    second: Tensor
    first: Tensor
    weight: Tensor | float = 1.0


class MomentCollector:
    """Watches one layer run, batch after batch, and sums the moments of the blocks that are named."""

    def __init__(self, shape: Shape, names: Sequence[str]) -> None:
        blocks = dict(shape.spec.blocks())
        self.outputs = {name: blocks[name].output_path for name in names}
        self.norm = shape.spec.ffn.norm
        self.pending: Tensor | None = None
        self.weight = torch.empty(0)
        self.sums: dict[str, Moments] = {}
        self.total = torch.zeros((), dtype=torch.float64)
        self.tokens = 0

    @property
    def watch(self) -> Watch:
        # The norm in front of the FFN reads the residual stream after attention: after the inputs of o, before down's.
        watch: dict[str, Callable[[Tensor], None]] = {self.norm: self._residual}
        if "attention" in self.outputs:
            watch[self.outputs["attention"]] = self._wait
        if "ffn" in self.outputs:
            watch[self.outputs["ffn"]] = lambda inputs: self._add("ffn", inputs)
        return watch

    def moments(self, name: str) -> Moments:
        """Of one block; the collector lets go of them."""
        sums = self.sums.pop(name)
        return Moments(sums.second.div_(self.total), sums.first / self.total, self.total / self.tokens)

    def _wait(self, inputs: Tensor) -> None:
        self.pending = inputs

    def _residual(self, residual: Tensor) -> None:
        squares = residual.flatten(0, -2).float().square().mean(-1, keepdim=True)
        self.weight = squares.clamp_min(1e-12).reciprocal()
        self.total = self.total.to(squares.device) + self.weight.sum().double()
        self.tokens += len(squares)
        if self.pending is not None:
            self._add("attention", self.pending)
            self.pending = None

    def _add(self, name: str, inputs: Tensor) -> None:
        x = inputs.flatten(0, -2).float()
        heavy = x * self.weight
        second, first = (heavy.T @ x).double(), heavy.sum(0).double()
        before = self.sums.get(name)
        if before is not None:
            second, first = before.second.add_(second), before.first.add_(first)
        self.sums[name] = Moments(second, first)


def observe_moments(stream: Stream, index: int, shape: Shape, name: str) -> Moments:
    """Moments of the inputs of the output projection of block `name` in layer `index`, over all of the stream.

    Runs the layer as it is now and leaves the stream where it was.
    """
    collector = MomentCollector(shape, [name])
    stream.observe(index, collector.watch)
    return collector.moments(name)
