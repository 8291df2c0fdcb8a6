"""Cut a stream of tokens into windows, set held-out windows aside, and group windows into batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgprune_cli.data.tokens import tokens_of
from pgprune_cli.errors import UserError


@dataclass(frozen=True)
class CalibrationText:
    """The calibration text of a search.

    search: windows `(N, T)` int64 that the search runs over; heldout: windows `(N, T)` int64 from the end of the text,
    which only measure the decision; stream: the tokens `(N,)` int64 before the held-out windows.
    """

    search: Tensor
    heldout: Tensor
    stream: Tensor

    def long_windows(self, count: int, seqlen: int) -> Tensor:
        """Return at most `count` windows `(N, seqlen)`, spread over the text without its held-out part."""
        return spread(cut_windows(self.stream, min(seqlen, len(self.stream))), count)


def calibration_text(corpus: str, tokenizer: Any, windows: int, heldout: int, seqlen: int) -> CalibrationText:
    """Read at most `windows` windows of `seqlen` tokens, spread over the corpus, and `heldout` windows at its end.

    Raises UserError if the corpus is too short for the held-out windows and one more.
    """
    tokens = tokens_of(corpus, "calibration", tokenizer, at_least=(windows + heldout) * seqlen)
    heldout_tokens = heldout * seqlen
    if len(tokens) < heldout_tokens + seqlen:
        raise UserError(
            f"{corpus}: {len(tokens)} tokens are too few for {heldout} held-out windows of {seqlen} tokens and one "
            "window to search over. Use a longer text, or lower calibration.heldout or calibration.seqlen."
        )
    end = len(tokens) - heldout_tokens
    stream = tokens[:end]
    return CalibrationText(spread(cut_windows(stream, seqlen), windows), tokens[end:].view(heldout, seqlen), stream)


def cut_windows(tokens: Tensor, seqlen: int) -> Tensor:
    """Cut the stream `(N,)` into whole windows `(N // seqlen, seqlen)`; an incomplete last window is dropped."""
    return tokens[: len(tokens) // seqlen * seqlen].view(-1, seqlen)


def spread(rows: Tensor, count: int) -> Tensor:
    """Return `count` evenly spaced rows, or all rows if there are no more than that."""
    return rows if len(rows) <= count else rows[torch.arange(count) * len(rows) // count]


@dataclass(frozen=True)
class Batches:
    """Windows `(N, T)` in a seeded order that changes every epoch.

    A batch depends only on its position, so a resumed search needs no data-loader state.
    """

    windows: Tensor
    batch: int
    seed: int

    def at(self, position: int) -> Tensor:
        """Return the batch `(B, T)` at a position ≥ 0. Windows that do not fill a last batch wait for a later epoch."""
        size = min(self.batch, len(self.windows))
        batches_per_epoch = len(self.windows) // size
        epoch, index = divmod(position, batches_per_epoch)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % (1 << 63))
        order = torch.randperm(len(self.windows), generator=generator)
        return self.windows[order[index * size : (index + 1) * size]]
