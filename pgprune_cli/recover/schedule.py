"""Which windows a recovery trains on, in which order, and for how many steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pgprune_cli.recipe.schema import RecoverSettings
from pgprune_cli.recover.texts import RecoveryText

CHECKPOINTS = 8
"""How many checkpoints `checkpoint_every: 0` makes."""


@dataclass(frozen=True)
class Schedule:
    """How long a recovery trains. steps: optimizer steps; windows_per_step: over all processes; every: steps between
    checkpoints."""

    steps: int
    windows_per_step: int
    every: int

    @classmethod
    def of(cls, settings: RecoverSettings, processes: int) -> Schedule:
        """Return the schedule that reads at least `recover.tokens` tokens."""
        windows = settings.batch * settings.accumulate * processes
        steps = -(-settings.tokens // (windows * settings.seqlen))
        return cls(steps, windows, settings.checkpoint_every or -(-steps // CHECKPOINTS))

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is due after this step."""
        return step % self.every == 0 or step == self.steps


class WindowOrder(Dataset[dict[str, Tensor]]):
    """The windows of a whole training in order: those of the first step, of the second, and so on.

    Every pass over the text has its own random order, which depends on the seed only. Every item has the window
    `input_ids` `(T,)` int64, its row `rows` in the text `()` int64, and `positions` `(T,)` bool, which say what is
    trained on.
    """

    def __init__(self, text: RecoveryText, windows: int, seed: int) -> None:
        self.text, self.windows, self.seed = text, windows, seed
        self._shuffled = (-1, torch.empty(0, dtype=torch.int64))

    def __len__(self) -> int:
        return self.windows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return window_at(self.text, int(self._order(index // self.text.training)[index % self.text.training]))

    def _order(self, number: int) -> Tensor:
        """Return the rows of the pass of this number in their order."""
        if self._shuffled[0] != number:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            self._shuffled = (number, torch.randperm(self.text.training, generator=generator))
        return self._shuffled[1]


def window_at(text: RecoveryText, row: int) -> dict[str, Tensor]:
    """Return one window of the text as `WindowOrder` has it."""
    window = text.windows[row]
    positions = torch.ones(len(window), dtype=torch.bool) if text.trained is None else text.trained[row]
    return {"input_ids": window, "rows": torch.tensor(row), "positions": positions}


def heldout_batch(text: RecoveryText, number: int, batch: int) -> dict[str, Tensor]:
    """Return a batch of held-out windows, counted from 0. It has no rows beyond the last batch."""
    rows = range(len(text.windows))[text.training + number * batch :][:batch]
    items = [window_at(text, row) for row in rows]
    if not items:  # another process still has one: the last window again, of which nothing counts
        last = window_at(text, len(text.windows) - 1)
        items = [last | {"positions": torch.zeros_like(last["positions"])}]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}
