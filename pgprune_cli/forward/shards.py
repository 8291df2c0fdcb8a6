"""Calibration text in shards, which the processes of a search run and add up in a fixed order.

Whatever is summed over text (moments, gradients, errors) is summed within each shard first, and then over the shards in
a binary tree. Which process has which shards does not change a bit. On CPUs there are SHARDS of them. On GPUs there is
one, which every process has: a layer computes in less time than gloo takes to send what would have to be added up
(docs/scale.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from weakref import WeakSet

import torch
from torch import Tensor

from pgprune_cli.distributed import ALONE, Ranks
from pgprune_cli.forward.layerwise import LayerwiseRun, start_layerwise
from pgprune_cli.model.prunable import PrunableModel

SHARDS = 2
"""Shards of a text on CPUs: a power of two. Each costs a single process some time, because products get smaller."""


@dataclass(frozen=True)
class Shards:
    """Consecutive parts of a text, and which of them this process has.

    windows: how many each shard has; their number is a power of two; ranks: of the processes. Those above the largest
    power of two have the shards of others again, and nobody needs what they add up.
    """

    windows: tuple[int, ...]
    ranks: Ranks = ALONE

    @property
    def own(self) -> range:
        """The shards of this process."""
        each = len(self.windows) // self._owners
        first = self.ranks.rank % self._owners * each
        return range(first, first + each)

    @property
    def is_divided(self) -> bool:
        """Whether processes have different shards."""
        return self._owners > 1

    def rows(self, shard: int, windows: Tensor) -> Tensor:
        """Return which of some windows `(n,)` of the text an own shard has: as rows of the text of this process."""
        first = sum(self.windows[:shard])
        own = windows[(windows >= first) & (windows < first + self.windows[shard])]
        return own - sum(self.windows[: self.own.start])

    def sum(self, parts: Iterable[Sequence[Tensor]]) -> list[Tensor]:
        """Return the sums over all shards of some tensors: the same bits on every process.

        parts: the tensors of each own shard. They are overwritten. At most three shards' are kept at a time.
        """
        own = _tree_sum(parts)
        if not self.is_divided:
            return own
        received = zip(*(self.ranks.exchange(tensor) for tensor in own), strict=True)
        return _tree_sum(list(received)[: self._owners])

    def total(self, windows: Tensor, measure: Callable[[Tensor], float]) -> float:
        """Return the sum of a measure over some windows `(n,)` of the text.

        measure: of rows of the text of this process, those of one of its shards.
        """
        own = ([torch.tensor(measure(self.rows(shard, windows)), dtype=torch.float64)] for shard in self.own)
        return float(self.sum(own)[0])

    @property
    def _owners(self) -> int:
        """How many processes have shards that only they have."""
        return _power_of_two(min(self.ranks.world_size, len(self.windows)))


@dataclass(frozen=True)
class ShardedRun:
    """Layer-wise runs over the shards of this process: of the same model, with the same arguments of its layers.

    batches: those of the text that this process has.
    """

    shards: Shards
    runs: Sequence[LayerwiseRun]
    batches: range

    def advance(self, index: int) -> None:
        """Run layer `index` on the own shards, see `LayerwiseRun.advance`."""
        for run in self.runs:
            run.advance(index)

    @property
    def hidden_states(self) -> list[Tensor]:
        """Those of all own batches, see `LayerwiseRun`."""
        return [batch for run in self.runs for batch in run.hidden_states]


def start_sharded(
    model: PrunableModel, batches: Sequence[Tensor], ranks: Ranks = ALONE, *, copies: int = 1
) -> ShardedRun:
    """Start layer-wise runs at the first layer, from batches of tokens `(B, T)`. Raises ValueError without batches.

    copies: as in `start_layerwise`.
    """
    places = shard_batches(len(batches), model.device)
    shards = shards_of(batches, places, ranks)
    own = own_batches(shards, places)
    whole = start_layerwise(model, batches[own.start : own.stop], copies=copies)
    parts = [whole.hidden_states[places[shard].start - own.start :][: len(places[shard])] for shard in shards.own]
    runs = [replace(whole, hidden_states=states, followers=WeakSet()) for states in parts]
    return ShardedRun(shards, runs, own)


def shard_batches(count: int, device: torch.device) -> list[range]:
    """Return which of `count` batches each shard has. This depends on the kind of device, not on the processes."""
    return split_batches(count, SHARDS if device.type == "cpu" else 1)


def split_batches(count: int, most: int) -> list[range]:
    """Return which of `count` batches each shard has, if there are at most `most` shards."""
    shards = _power_of_two(min(most, max(1, count)))
    return [range(shard * count // shards, (shard + 1) * count // shards) for shard in range(shards)]


def shards_of(batches: Sequence[Tensor], places: Sequence[range], ranks: Ranks) -> Shards:
    """Return the shards of some batches `(B, T)` for a process. places: which of the batches each shard has."""
    return Shards(tuple(sum(len(batches[place]) for place in part) for part in places), ranks)


def own_batches(shards: Shards, places: Sequence[range]) -> range:
    """Return which batches a process has. places: which of the batches each shard has."""
    return range(places[shards.own.start].start, places[shards.own.stop - 1].stop)


def _power_of_two(most: int) -> int:
    """Return the largest power of two that is at most `most`."""
    return 1 << (most.bit_length() - 1)


def _tree_sum(parts: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """Return the sums of a power of two of lists of tensors: of neighbours first. They are overwritten."""
    waiting: list[tuple[int, Sequence[Tensor]]] = []  # how often each has been added to, and its sums
    for part in parts:
        level, sums = 0, part
        while waiting and waiting[-1][0] == level:
            _, left = waiting.pop()
            level, sums = level + 1, [own.add_(other) for own, other in zip(left, sums, strict=True)]
        waiting.append((level, sums))
    return list(waiting[0][1])
