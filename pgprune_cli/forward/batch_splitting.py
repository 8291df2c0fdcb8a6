"""Run a batch in one go as long as memory suffices, and in halves, quarters and so on once it has run out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pgprune_cli.errors import RunError
from pgprune_cli.model.out_of_memory import is_out_of_memory

OUT_OF_MEMORY = (
    "out of memory with one window at a time. Use more devices, or lower calibration.seqlen (for the scores: "
    "scores.seqlen)."
)


class BatchSplitter:
    """Decides how many windows run at a time.

    max_windows: the most that fit; None, which means a whole batch, until memory has run out once.
    """

    def __init__(self) -> None:
        self.max_windows: int | None = None

    def run_slices(
        self, windows: int, run: Callable[[slice], None], make_room: Callable[[], None] | None = None
    ) -> None:
        """Call `run` for consecutive slices of `windows` windows.

        A slice that runs out of memory is halved and retried; before the first of them is, `make_room` frees memory.
        When `run` fails with an error that `is_out_of_memory` recognises, it must not have recorded anything for its
        slice. Raises RunError if one window does not fit.
        """
        done = 0
        while done < windows:
            size = min(self.max_windows or windows, windows - done)
            try:
                run(slice(done, done + size))
            except RuntimeError as error:
                if make_room is None or not is_out_of_memory(error):
                    self._refuse_unless_divisible(size, error)
            else:
                done += size
                continue
            if make_room is None:
                self._halve(size)
            else:
                make_room()
                make_room = None
                torch.cuda.empty_cache()

    def run_batches(self, batches: Sequence[Tensor], run: Callable[[Sequence[Tensor]], None]) -> None:
        """Call `run` with all batches of tokens `(B, T)`, and again from the start with smaller ones if it fails.

        Raises RunError if one window does not fit.
        """
        largest = max(map(len, batches))
        while True:
            size = min(self.max_windows or largest, largest)
            try:
                run([part for tokens in batches for part in tokens.split(size)])
                return
            except RuntimeError as error:
                self._refuse_unless_divisible(size, error)
            self._halve(size)

    def _refuse_unless_divisible(self, size: int, error: RuntimeError) -> None:
        if not is_out_of_memory(error):
            raise error
        if size == 1:
            raise RunError(OUT_OF_MEMORY) from error

    def _halve(self, size: int) -> None:
        # Only after the except clause: until then the traceback keeps the tensors of the failed pass alive.
        torch.cuda.empty_cache()
        self.max_windows = (size + 1) // 2
