"""Second moments of the inputs of the output projections: what the metric `obs` and every repair work from.

A token is weighted by 1 / ‖its residual stream‖². What follows is normalised, and without the weights the attention
sinks, a thousand times as large as other tokens, would dominate everything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from pgprune_cli.forward.layerwise import LayerwiseRun, Observers
from pgprune_cli.model.families.adapter import Block, ModelFamily


@dataclass(frozen=True)
class Moments:
    """Weighted means over tokens of the inputs x of one output projection, float64.

    second: of x xᵀ `(in, in)`; first: of x `(in,)`; weight: the mean weight of a token, a scalar. An error times
    `weight` is relative to the residual stream.
    """

    second: Tensor
    first: Tensor
    weight: Tensor


class MomentCollector:
    """Observes one layer, batch after batch, and sums the moments of some of its blocks."""

    def __init__(self, family: ModelFamily, blocks: Sequence[Block]) -> None:
        self.residual_norm = family.residual_norm
        self.output_paths = {block.name: block.output_path for block in blocks}
        self.sums: dict[str, Moments] = {}
        self.tokens: Counter[str] = Counter()

    @property
    def observers(self) -> Observers:
        """What a layer-wise run has to call."""
        return {(self.residual_norm, path): partial(self._add, name) for name, path in self.output_paths.items()}

    def moments(self, block: str) -> Moments:
        """Return the moments of one block, and drop them here."""
        sums = self.sums.pop(block)
        return Moments(sums.second.div_(sums.weight), sums.first / sums.weight, sums.weight / self.tokens.pop(block))

    def _add(self, block: str, residual: Tensor, inputs: Tensor) -> None:
        squares = residual.flatten(0, -2).float().square().mean(-1, keepdim=True)
        weight = squares.clamp_min(1e-12).reciprocal()
        x = inputs.flatten(0, -2).float()
        weighted = x * weight
        batch = Moments((weighted.T @ x).double(), weighted.sum(0).double(), weight.sum().double())
        # All memory has been allocated: from here on nothing fails.
        sums = self.sums.setdefault(block, batch)
        if sums is not batch:
            sums.second.add_(batch.second)
            sums.first.add_(batch.first)
            sums.weight.add_(batch.weight)
        self.tokens[block] += len(squares)


def observe_moments(run: LayerwiseRun, index: int, family: ModelFamily, block: Block) -> Moments:
    """Return the moments of one block of layer `index` over all batches of a layer-wise run.

    The layer runs as it is now, and the run does not advance.
    """
    collector = MomentCollector(family, [block])
    run.observe(index, collector.observers)
    return collector.moments(block.name)
