"""What a tiny block reads and writes, and the start of its fit, outside of a repair; and fits that always improve."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from pgprune_cli.forward.block_text import BlockRunner, BlockText
from pgprune_cli.forward.shards import ShardedRun, start_sharded
from pgprune_cli.model.families.adapter import Block
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.unit_tensors import KeptElements, gather
from pgprune_cli.repair.sublayer import SublayerFit
from pgprune_cli.repair.training import Weights

LENGTH = 20
"""Tokens of a window: more than the sliding windows of the tiny models."""


WORDS = 8
"""Different tokens: so few that a fit to some windows is good on others."""


def windows(count: int = 16) -> list[Tensor]:
    """Return batches of tokens `(≤ 4, LENGTH)` with `count` windows in all."""
    tokens = torch.randint(WORDS, (count, LENGTH), generator=torch.Generator().manual_seed(0))
    return list(tokens.split(4))


class ReadBlock(NamedTuple):
    """A dense block behind dense layers, with what it reads and writes on `windows()`."""

    model: PrunableModel
    run: ShardedRun
    index: int
    block: Block
    text: BlockText

    @property
    def layer(self) -> nn.Module:
        """The decoder layer of the block."""
        return self.model.layers[self.index]

    @property
    def module(self) -> nn.Module:
        """The module of the block."""
        return self.layer.get_submodule(self.block.module)

    def runner(self, mask: Tensor) -> BlockRunner:
        """Return what runs the block on weights for the elements of a regular mask."""
        size = self.model.family.grid(self.layer, self.block).kept(mask)
        return BlockRunner(self.run.runs[0], self.index, self.model.family, self.block, size)

    def fit(self, mask: Tensor) -> SublayerFit:
        """Return the fit of the block in one epoch."""
        return SublayerFit(self.runner(mask), self.text, self.run.shards, 1, 0)

    def weights(self, mask: Tensor) -> dict[str, Tensor]:
        """Return the block's own weights for the elements of a regular mask."""
        return {
            tensor.name: gather(_value(self.module, tensor.name), tensor, KeptElements(mask))
            for tensor in self.model.family.unit_tensors(self.layer, self.block)
        }


def read_block(model: nn.Module, index: int, name: str, text: list[Tensor] | None = None) -> ReadBlock:
    """Run dense layers up to a block, and record what it reads and writes."""
    prunable = PrunableModel.of(model)
    block = prunable.shape.blocks[index][name]
    run = start_sharded(prunable, windows() if text is None else text)
    for before in range(index):
        run.advance(before)
    block_text = BlockText(run.runs, prunable.family, block)
    for own in run.runs:
        own.observe(index, block_text.observers, block_text.watchers)
    return ReadBlock(prunable, run, index, block, block_text)


def _value(module: nn.Module, name: str) -> Tensor:
    path, _, key = name.rpartition(".")
    value: Tensor = getattr(module.get_submodule(path), key)
    return value.data


def always_find_something_better(monkeypatch: pytest.MonkeyPatch, windows: int) -> None:
    """Let every look of a fit at its text find something better, so that it ends with two at all of the `windows`."""
    squared_error, looks = SublayerFit.squared_error, itertools.count()

    def look(fit: SublayerFit, weights: Weights, own: Tensor) -> float:
        squared_error(fit, weights, own)
        return -next(looks) if len(own) < windows else next(looks)

    monkeypatch.setattr(SublayerFit, "squared_error", look)
