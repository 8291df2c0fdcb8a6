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

    Every reading of the text has its own random order, which depends on the seed only. If the order is `shifted`, the
    windows of every reading but the first also begin elsewhere in the text, so that no token is predicted from the same
    context again. Every item has the window `input_ids` `(T,)` int64, its row `rows` in the text `()` int64, and
    `positions` `(T,)` bool, which say what is trained on.
    """

    def __init__(self, text: RecoveryText, windows: int, seed: int, *, shifted: bool) -> None:
        self.text, self.windows, self.seed, self.shifted = text, windows, seed, shifted
        self._shuffled = (-1, torch.empty(0, dtype=torch.int64))

    def __len__(self) -> int:
        return self.windows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        reading, place = divmod(index, self.text.training)
        row = int(self._order(reading)[place])
        item = window_at(self.text, row)
        if self.shifted:
            item["input_ids"] = self.text.window(row, int(self.text.text_tokens * share_of_window(reading)))
        return item

    def _order(self, reading: int) -> Tensor:
        """Return the rows of this reading of the text in their order."""
        if self._shuffled[0] != reading:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + reading)
            self._shuffled = (reading, torch.randperm(self.text.training, generator=generator))
        return self._shuffled[1]


def share_of_window(reading: int) -> float:
    """Return where the windows of a reading begin, as a share of a window: 0, 1/2, 1/4, 3/4, 1/8, 5/8 …

    This is van der Corput's sequence: each reading begins as far as possible from those before.
    """
    share, step = 0.0, 0.5
    while reading:
        share += step * (reading % 2)
        reading, step = reading // 2, step / 2
    return share


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
