"""Windows go through a model together as long as memory lasts, and in halves, quarters and so on from then on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pgprune_cli.errors import RunError

TOO_LITTLE = (
    "out of memory with one window at a time; give more devices, or lower calibration.seqlen (for the scores: "
    "scores.seqlen)"
)


class BatchSplitter:
    """How many windows go through at a time: `most`, which is all of a batch (None) until memory runs out."""

    def __init__(self) -> None:
        self.most: int | None = None

    def each(self, windows: int, run: Callable[[slice], None]) -> None:
        """Calls `run` for slices of so many `windows`, one after another; one that fails is tried again in halves.

        Where `run` raises torch.OutOfMemoryError it must have taken nothing of its windows yet. Raises RunError where
        the memory does not suffice for one window.
        """
        done = 0
        while done < windows:
            tried = min(self.most or windows, windows - done)
            try:
                run(slice(done, done + tried))
            except torch.OutOfMemoryError as error:
                self._refuse_one(tried, error)
            else:
                done += tried
                continue
            self._halve(tried)

    def all(self, batches: Sequence[Tensor], run: Callable[[Sequence[Tensor]], None]) -> None:
        """Calls `run` with all batches of tokens `(B, T)`, and from the beginning with smaller ones where it fails.

        Raises RunError as `each` does.
        """
        largest = max(map(len, batches))
        while True:
            tried = min(self.most or largest, largest)
            try:
                run([part for tokens in batches for part in tokens.split(tried)])
                return
            except torch.OutOfMemoryError as error:
                self._refuse_one(tried, error)
            self._halve(tried)

    def _refuse_one(self, tried: int, error: torch.OutOfMemoryError) -> None:
        if tried == 1:
            raise RunError(TOO_LITTLE) from error

    def _halve(self, tried: int) -> None:
        # Not before the error is gone, whose traceback holds on to what the forward had.
        torch.cuda.empty_cache()
        self.most = (tried + 1) // 2
