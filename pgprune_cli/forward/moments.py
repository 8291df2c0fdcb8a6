"""Second moments of what the output projections read, the raw material of the `obs` metric and of every repair.

A token counts by 1 / ‖its residual stream‖²: what follows is normalised, and the attention sinks, a thousand times as
large as other tokens, would be all that counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from pgprune_cli.forward.layerwise import Stream, Watch
from pgprune_cli.model.prunable import Shape


@dataclass(frozen=True)
class Moments:
    """Of the inputs of one output projection, weighted means over tokens: second `(in, in)`, first `(in,)`, float64.

    weight: the tokens' mean weight, a float64 scalar; times it, an error is relative to the residual stream.
    """

    second: Tensor
    first: Tensor
    weight: Tensor


class MomentCollector:
    """Watches one layer run, batch after batch, and sums the moments of the blocks that are named."""

    def __init__(self, shape: Shape, names: Sequence[str]) -> None:
        blocks = dict(shape.spec.blocks())
        self.outputs = {name: blocks[name].output_path for name in names}
        self.norm = shape.spec.ffn.norm
        self.sums: dict[str, Moments] = {}
        self.tokens: Counter[str] = Counter()

    @property
    def watch(self) -> Watch:
        # The norm in front of the FFN reads the residual stream.
        return {(self.norm, path): partial(self._add, name) for name, path in self.outputs.items()}

    def moments(self, name: str) -> Moments:
        """Of one block; the collector lets go of them."""
        sums = self.sums.pop(name)
        return Moments(
            sums.second.div_(sums.weight),
            sums.first / sums.weight,
            sums.weight / self.tokens.pop(name),
        )

    def _add(self, name: str, residual: Tensor, inputs: Tensor) -> None:
        squares = residual.flatten(0, -2).float().square().mean(-1, keepdim=True)
        weight = squares.clamp_min(1e-12).reciprocal()
        x = inputs.flatten(0, -2).float()
        heavy = x * weight
        new = Moments((heavy.T @ x).double(), heavy.sum(0).double(), weight.sum().double())
        # Memory for all of it was there: from here on nothing fails.
        sums = self.sums.setdefault(name, new)
        if sums is not new:
            sums.second.add_(new.second)
            sums.first.add_(new.first)
            sums.weight.add_(new.weight)
        self.tokens[name] += len(squares)


def observe_moments(stream: Stream, index: int, shape: Shape, name: str) -> Moments:
    """Moments of the inputs of the output projection of block `name` in layer `index`, over all of the stream.

    Runs the layer as it is now and leaves the stream where it was.
    """
    collector = MomentCollector(shape, [name])
    stream.observe(index, collector.watch)
    return collector.moments(name)
