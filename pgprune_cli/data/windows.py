"""Tokens to windows and batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgprune_cli.data.tokens import tokens_of
from pgprune_cli.errors import UserError


@dataclass(frozen=True)
class CalibrationText:
    """Windows `(N, T)` int64 to search over, and others, from the end of the text, only to judge by."""

    search: Tensor
    heldout: Tensor
    stream: Tensor

    def long_windows(self, count: int, seqlen: int) -> Tensor:
        """At most `count` windows `(N, seqlen)` of the searched-over part, spread over it."""
        return spread(cut_windows(self.stream, min(seqlen, len(self.stream))), count)


def calibration_text(corpus: str, tokenizer: Any, windows: int, heldout: int, seqlen: int) -> CalibrationText:
    """At most `sequences` windows of `seqlen` tokens spread over the corpus, and `heldout` that no search sees.

    Raises UserError for a corpus too short for one window of each.
    """
    tokens = tokens_of(corpus, "calibration", tokenizer, wanted=(windows + heldout) * seqlen)
    kept_apart = heldout * seqlen
    if len(tokens) < kept_apart + seqlen:
        raise UserError(
            f"{corpus}: {len(tokens)} tokens are too few for {heldout} held-out windows of {seqlen} and one to search "
            "over; give more text, or lower calibration.heldout or calibration.seqlen"
        )
    stream = tokens[: len(tokens) - kept_apart]
    return CalibrationText(
        spread(cut_windows(stream, seqlen), windows), tokens[len(tokens) - kept_apart :].view(heldout, seqlen), stream
    )


def cut_windows(tokens: Tensor, seqlen: int) -> Tensor:
    """The stream `(N,)` cut into whole windows `(N // seqlen, seqlen)`; a last part of one is left out."""
    return tokens[: len(tokens) // seqlen * seqlen].view(-1, seqlen)


def spread(rows: Tensor, count: int) -> Tensor:
    """`count` rows at even distances, or all when there are fewer."""
    return rows if len(rows) <= count else rows[torch.arange(count) * len(rows) // count]


@dataclass(frozen=True)
class Batches:
    """Windows `(N, T)` in a seeded order, shuffled anew every epoch. A position names a batch: no state to lose."""

    windows: Tensor
    batch: int
    seed: int

    def at(self, position: int) -> Tensor:
        """The batch `(B, T)` at a position ≥ 0; the last windows of an epoch that make no whole batch are left out."""
        size = min(self.batch, len(self.windows))
        an_epoch = len(self.windows) // size
        epoch, place = divmod(position, an_epoch)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % (1 << 63))
        order = torch.randperm(len(self.windows), generator=generator)
        return self.windows[order[place * size : (place + 1) * size]]
