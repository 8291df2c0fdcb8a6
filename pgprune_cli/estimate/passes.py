"""What passes through a model take: through dense layers, under masks; and where the hidden states are meanwhile.

Everything is counted for the process that does most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pgprune_cli.distributed import Ranks
from pgprune_cli.estimate import flops
from pgprune_cli.estimate.sizes import Sizes, Texts, tokens_in
from pgprune_cli.estimate.traffic import (
    DENSE_LOGIT,
    GATHERED,
    LOGIT,
    LOSS_LOGIT,
    head_bytes,
    inner_traffic,
    operations,
    rows_operations,
    stream_traffic,
    unpacking,
)
from pgprune_cli.estimate.work import Work
from pgprune_cli.forward.curvature import curvature_windows
from pgprune_cli.forward.shards import own_batches, shards_of, split_batches
from pgprune_cli.forward.states import states_bytes
from pgprune_cli.repair.least_squares import COPIES


@dataclass(frozen=True)
class Setup:
    """How a search runs.

    table: fraction of the width table that is on the device; states: bytes that it has for the hidden states of
    layer-wise passes, which are on the host otherwise; solves: whether equations are solved there; processes: how many
    share the work; shards: of calibration text, at most, which they share too (forward/shards.py).
    """

    table: float = 1.0
    states: float = math.inf
    solves: bool = True
    processes: int = 1
    shards: int = 1


@dataclass(frozen=True)
class OwnText:
    """What a process has of a text: which of its batches, in how many shards.

    is_divided: whether other processes have the rest.
    """

    batches: range
    shards: int
    is_divided: bool

    @classmethod
    def of(cls, batches: Sequence[Tensor], setup: Setup) -> OwnText:
        """Return what the process with most of a text `(B, T)` has of it."""
        places = split_batches(len(batches), setup.shards)
        by_rank = [shards_of(batches, places, Ranks(rank, setup.processes)) for rank in range(setup.processes)]
        most = max(by_rank, key=lambda shards: sum(shards.windows[shard] for shard in shards.own))
        return cls(own_batches(most, places), len(most.own), most.is_divided)

    def __call__(self, batches: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the batches that the process has."""
        return batches[self.batches.start : self.batches.stop]


def layers(sizes: Sizes, batches: Sequence[Tensor]) -> Work:
    """Return what running all dense layers on batches `(B, T)` takes."""
    blocks = sizes.blocks
    weights = len(batches) * sum(block.nbytes for block in blocks)
    per_token = sum(stream_traffic(sizes) + inner_traffic(sizes, block) for block in blocks)
    return Work(
        flops.layer_passes(sizes, batches),
        weights,
        tokens_in(batches) * per_token + unpacking(sizes, weights),
        operations=len(batches) * sum(operations(sizes, block) for block in blocks),
    )


def masks(sizes: Sizes, tokens: Tensor, count: int, setup: Setup) -> Work:
    """Return what the losses of `count` masks on `tokens` `(B, T)` take, without what the dense model takes.

    Weights of the table that the device has no room for are read from memory: the system has cached their files.
    """
    rows, blocks = tokens.shape[0] * (tokens.shape[1] - 1), sizes.blocks
    logit = LOSS_LOGIT if sizes.recipe.search.objective == "loss" else LOGIT
    kept = sum(block.keep_fraction * block.nbytes for block in blocks)
    table = sum(
        block.experts * block.keep_fraction * block.inputs * block.outputs * sizes.dtype.itemsize
        for block in blocks
        if block.keep_fraction < 1 and sizes.has_table and sizes.solves
    )
    # A width search reads the kept weights where they lie; a unit search gathers them first.
    gathered = [block for block in blocks if block.keep_fraction < 1 and not sizes.has_table]
    copies = 2 * sum(block.keep_fraction * block.nbytes for block in gathered)
    unpacked = unpacking(sizes, kept - table)  # repaired projections are not rounded
    per_token = sum(stream_traffic(sizes) + block.keep_fraction * inner_traffic(sizes, block) for block in blocks)
    work = Work(
        flops.forward_passes(sizes, tokens, 1),
        kept + head_bytes(sizes, rows),
        copies + unpacked + tokens.numel() * per_token + rows * sizes.vocabulary * logit,
        copied=(1 - setup.table) * table,
        staged=(1 - setup.table) * table,
        operations=sum(operations(sizes, block) for block in blocks) + GATHERED * len(gathered) + rows_operations(rows),
    )
    return work.times(count)


def dense_head(sizes: Sizes, tokens: Tensor) -> Work:
    """Return what one pass through the dense model's head on `tokens` takes."""
    rows = tokens.shape[0] * (tokens.shape[1] - 1)
    return Work(
        flops.head_passes(sizes, tokens),
        head_bytes(sizes, rows),
        rows * sizes.vocabulary * DENSE_LOGIT,
        operations=rows_operations(rows),
    )


def curvature(sizes: Sizes, batches: Sequence[Tensor], setup: Setup) -> Work:
    """Return what the weight of an error in every direction takes (forward/curvature.py).

    Processes divide the passes through the layers, batch by batch.
    """
    windows = curvature_windows(batches)
    tokens = tokens_in(windows)
    logits = Work(
        flops.curvature(sizes, windows),
        2 * head_bytes(sizes, tokens),
        26 * tokens * sizes.vocabulary + 20 * sizes.vocabulary * sizes.hidden,
    )
    return layers(sizes, windows[:: setup.processes]) + logits


def states(sizes: Sizes, batches: Sequence[Tensor], passes: int, setup: Setup, copies: int = 1) -> Work:
    """Return what moving the hidden states takes in passes through all layers: nothing if they are on the device."""
    moved = 2 * tokens_in(batches) * sizes.hidden * sizes.dtype.itemsize * sizes.layers
    return Work() if on_device(sizes, batches, setup, copies) else Work(awaited=passes * moved)


def on_device(sizes: Sizes, batches: Sequence[Tensor], setup: Setup, copies: int = 1) -> bool:
    """Return whether the device has room for `copies` tensors of the size of all hidden states."""
    return states_bytes(sizes.model, tokens_in(batches), copies) <= setup.states


def all_on_device(sizes: Sizes, texts: Texts, setup: Setup) -> bool:
    """Return whether the hidden states of every layer-wise pass are on the device."""
    copies = COPIES if sizes.fits_blocks else 1
    return (
        on_device(sizes, texts.scoring, setup)
        and on_device(sizes, texts.table, setup)
        and on_device(sizes, texts.repair, setup, copies)
    )
