"""Second moments of the inputs of the output projections: what the metric `obs` and every repair work from.

A token is weighted by 1 / ‖its residual stream‖². What follows is normalised, and without the weights the attention
sinks, a thousand times as large as other tokens, would dominate everything. If a norm follows the block (Gemma, OLMo),
an error of its output is divided by the length of that output, so the token is also weighted by 1 / ‖block output‖².
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pgprune_cli.distributed import ALONE, Ranks
from pgprune_cli.forward.expert_moments import ExpertMoments, ExpertSums, mean_square
from pgprune_cli.forward.gram import GramSum
from pgprune_cli.forward.layerwise import NO_OBSERVERS, NO_WATCHERS, LayerwiseRun, Observers, Watchers
from pgprune_cli.forward.shards import ShardedRun, start_sharded
from pgprune_cli.model.families.adapter import Block, ModelFamily
from pgprune_cli.model.prunable import PrunableModel


@dataclass(frozen=True)
class Moments:
    """Weighted means over tokens of the inputs x of one output projection, float32.

    second: of x xᵀ `(in, in)`; first: of x `(in,)`; weight: the mean weight of a token, a scalar. An error times
    `weight` is relative to the residual stream.
    """

    second: Tensor
    first: Tensor
    weight: Tensor


class BlockSums:
    """Sums the moments of one block over batches.

    first and weight are float64, and their sums over a batch are float32.
    """

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.second = GramSum(torch.zeros(inputs, inputs, device=device))
        self.first = torch.zeros(inputs, dtype=torch.float64, device=device)
        self.weight = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, weight: Tensor) -> None:
        """Add a batch: inputs x `(..., in)`, and the weights of its tokens `(N, 1)` float32."""
        root = weight.sqrt()
        # √w on both sides: rounded or not, such a sum has no negative eigenvalues.
        rows = inputs.flatten(0, -2) * root
        first, products = rows.T @ root.squeeze(1), self.second.products(rows, inputs.dtype)
        # All memory has been allocated: from here on nothing fails.
        self.second.add(products)
        self.first += first
        self.weight += weight.sum()

    @property
    def tensors(self) -> list[Tensor]:
        """What is added up over shards."""
        return [self.second.sums, self.first, self.weight, torch.tensor(self.second.rows)]

    def replace(self, tensors: Sequence[Tensor]) -> None:
        """Continue with what has been added up over shards."""
        self.second.sums, self.first, self.weight, rows = tensors
        self.second.rows = int(rows)

    def moments(self) -> Moments:
        """Return the moments. This overwrites the sums."""
        second = self.second.matrix().div_(self.weight)
        first, weight = self.first / self.weight, self.weight / self.second.rows
        return Moments(second, first.float(), weight.float())


NO_EXPERTS: Mapping[str, ExpertSums] = {}


class MomentCollector:
    """Observes one layer, batch after batch, and sums the moments of some of its blocks.

    experts: the sums of those blocks that are mixtures of experts, by name.
    """

    def __init__(
        self, family: ModelFamily, blocks: Sequence[Block], experts: Mapping[str, ExpertSums] = NO_EXPERTS
    ) -> None:
        self.experts = dict(experts)
        self.paths = {
            block.name: (family.residual, block.output_path, *([block.post_norm] if block.post_norm else []))
            for block in blocks
            if block.name not in self.experts
        }
        self.sums: dict[str, BlockSums] = {}

    @classmethod
    def of(
        cls, family: ModelFamily, layer: nn.Module, blocks: Sequence[Block], experts: Tensor | None = None
    ) -> MomentCollector:
        """Return the collector for blocks of a layer. experts: what a router chooses among, `(g,)` int64, or all."""
        routed = [block for block in blocks if family.groups_per_token(layer, block) is not None]
        return cls(family, blocks, {block.name: ExpertSums(family, layer, block, experts) for block in routed})

    @property
    def observers(self) -> Observers:
        """What a layer-wise run has to call."""
        dense = {paths: partial(self._add, name) for name, paths in self.paths.items()}
        return dense | {sums.paths: sums.add for sums in self.experts.values()}

    def moments(self, block: str) -> Moments | ExpertMoments:
        """Return the moments of one block, and drop them here."""
        if block in self.experts:
            return self.experts.pop(block).moments()
        return self.sums.pop(block).moments()

    @property
    def tensors(self) -> list[Tensor]:
        """What is added up over shards, of all blocks."""
        return [tensor for sums in self._all_sums for tensor in sums.tensors]

    def replace(self, tensors: Sequence[Tensor]) -> None:
        """Continue with what has been added up over shards."""
        left = list(tensors)
        for sums in self._all_sums:
            count = len(sums.tensors)
            sums.replace(left[:count])
            del left[:count]

    @property
    def _all_sums(self) -> list[BlockSums | ExpertSums]:
        return [*self.sums.values(), *self.experts.values()]

    def _add(self, block: str, residual: Tensor, inputs: Tensor, block_output: Tensor | None = None) -> None:
        weight = token_weights(residual, block_output)
        sums = self.sums.get(block) or BlockSums(inputs.shape[-1], inputs.device)
        sums.add(inputs, weight)
        self.sums[block] = sums


def token_weights(residual: Tensor, block_output: Tensor | None = None) -> Tensor:
    """Return the weights of tokens `(B · T, 1)` float32.

    residual: the stream between the blocks `(B, T, hidden)`; block_output: what passes the norm behind the block.
    """
    weight = mean_square(residual).reciprocal()
    return weight if block_output is None else weight / mean_square(block_output)


def block_root(family: ModelFamily, layer: nn.Module, block: Block, root: Tensor) -> Tensor:
    """Return R for an error of a block's output projection, given R `(hidden, hidden)` for the residual stream.

    They differ by the weight of the norm between them, if there is one.
    """
    if block.post_norm is None:
        return root
    return root * family.norm_weight(layer.get_submodule(block.post_norm)).to(root)


def collected(sharded: ShardedRun, collect: Callable[[LayerwiseRun], MomentCollector]) -> MomentCollector:
    """Return a collector with the moments of all shards. collect: returns one that has observed a run."""
    newest: list[MomentCollector] = []

    def parts() -> Iterator[list[Tensor]]:
        for run in sharded.runs:
            newest[:] = [collect(run)]
            yield newest[0].tensors

    sums = sharded.shards.sum(parts())
    newest[0].replace(sums)
    return newest[0]


def dense_moments(
    model: PrunableModel,
    batches: Sequence[Tensor],
    blocks_of: Callable[[int], Sequence[Block]],
    only: Collection[int] | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[tuple[int, MomentCollector]]:
    """Yield layers of the dense model with the moments of their blocks over all text.

    batches: tokens `(B, T)`; blocks_of: the blocks of a layer to observe; only: if given, yield just these layers;
    ranks: of the processes, of which each yields its own `share`, and all must reach the end. If they have different
    shards, as many layers as there are processes are observed before any is yielded, so that all use theirs at once.
    """
    sharded = start_sharded(model, batches, ranks)
    last, own = len(model.layers) - 1, range(len(model.layers)) if only is None else only
    waiting: list[tuple[int, MomentCollector]] = []

    def collect(run: LayerwiseRun) -> MomentCollector:
        collector = MomentCollector.of(model.family, model.layers[run.position], blocks_of(run.position))
        run.advance(run.position, collector.observers)
        return collector

    for index in range(last + 1):
        if sharded.shards.is_divided:
            collector = collected(sharded, collect)
            if index in own:
                waiting.append((index, collector))
            if index < last and (index + 1) % ranks.world_size:
                continue
        elif index in own:
            waiting.append((index, collected(sharded, collect)))
        elif index < max(own, default=-1):
            sharded.advance(index)
        while waiting:
            yield waiting.pop()


def observe_moments(
    sharded: ShardedRun,
    index: int,
    family: ModelFamily,
    block: Block,
    experts: Tensor | None = None,
    observers: Observers = NO_OBSERVERS,
    watchers: Watchers = NO_WATCHERS,
) -> Moments | ExpertMoments:
    """Return the moments of one block of layer `index` over all shards of a text.

    The layer runs as it is now, and the runs do not advance. experts: as in `MomentCollector.of`; observers, watchers:
    see the same passes, those over the own shards.
    """

    def collect(run: LayerwiseRun) -> MomentCollector:
        collector = MomentCollector.of(family, run.layers[index], [block], experts)
        run.observe(index, {**collector.observers, **observers}, watchers)
        return collector

    return collected(sharded, collect).moments(block.name)
