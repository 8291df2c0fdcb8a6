"""Cut a stream of tokens into windows, set held-out windows aside, and group windows into batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgprune_cli.data.tokens import tokens_of
from pgprune_cli.errors import UserError


@dataclass(frozen=True)
class CalibrationText:
    """The calibration text of a search.

    search: windows `(N, T)` int64 that the search runs over; heldout: other windows `(N, T)` int64, spread over the
    text, which only measure the decision; stream: the tokens `(N,)` int64 of the text without the held-out windows;
    bos: the token that every window begins with, None if windows hold only the text.
    """

    search: Tensor
    heldout: Tensor
    stream: Tensor
    bos: int | None = None

    def long_windows(self, count: int, seqlen: int) -> Tensor:
        """Return at most `count` windows `(N, seqlen)`, spread over the text without its held-out part."""
        longest = len(self.stream) + (self.bos is not None)
        return spread(cut_windows(self.stream, min(seqlen, longest), self.bos), count)


def calibration_text(
    corpus: str, tokenizer: Any, windows: int, heldout: int, seqlen: int, bos: int | None = None
) -> CalibrationText:
    """Read at most `windows` windows of `seqlen` tokens and set `heldout` others aside, both spread over the corpus.

    A loss on neighbouring windows depends on the few documents that they come from, so it is a poor measure of a
    decision. bos: the token that every window begins with, see `cut_windows`.

    Raises UserError if the corpus is too short for the held-out windows and one more.
    """
    text_tokens = text_tokens_in(seqlen, bos)
    tokens = tokens_of(
        corpus, "calibration", tokenizer, at_least=(windows + heldout) * text_tokens, without_bos=bos is not None
    )
    rows = cut_windows(tokens, text_tokens)
    if len(rows) <= heldout:
        raise UserError(
            f"{corpus}: {len(tokens)} tokens are too few for {heldout} held-out windows of {seqlen} tokens and one "
            "window to search over. Use a longer text, or lower calibration.heldout or calibration.seqlen."
        )
    is_heldout = heldout_rows(len(rows), heldout)
    stream = torch.cat([rows[~is_heldout].flatten(), tokens[rows.numel() :]])
    search = spread(begin_with(bos, rows[~is_heldout]), windows)
    return CalibrationText(search, begin_with(bos, rows[is_heldout]), stream, bos)


def heldout_rows(rows: int, heldout: int) -> Tensor:
    """Return a mask `(rows,)` with `heldout` rows set: the middles of that many equal parts of the rows."""
    is_heldout = torch.zeros(rows, dtype=torch.bool)
    is_heldout[(2 * torch.arange(heldout) + 1) * rows // (2 * heldout)] = True
    return is_heldout


def text_tokens_in(seqlen: int, bos: int | None) -> int:
    """Return how many tokens of the text a window of `seqlen` tokens holds: all, or all but the BOS token."""
    return seqlen if bos is None else seqlen - 1


def cut_windows(tokens: Tensor, seqlen: int, bos: int | None = None) -> Tensor:
    """Cut the stream `(N,)` into whole windows `(W, seqlen)`; an incomplete last window is dropped.

    With `bos`, every window begins with that token, followed by `seqlen - 1` tokens of the stream. Either way every
    token of the stream is in one window, in order, except those of the incomplete last one.
    """
    text_tokens = text_tokens_in(seqlen, bos)
    rows = tokens[: len(tokens) // text_tokens * text_tokens].view(-1, text_tokens)
    return begin_with(bos, rows)


def begin_with(bos: int | None, rows: Tensor) -> Tensor:
    """Return the rows `(W, T)` with the token `bos` in front of each, `(W, T + 1)`; without `bos`, as they are."""
    return rows if bos is None else torch.cat([rows.new_full((len(rows), 1), bos), rows], dim=1)


def spread(rows: Tensor, count: int) -> Tensor:
    """Return `count` evenly spaced rows, or all rows if there are no more than that."""
    return rows if len(rows) <= count else rows[torch.arange(count) * len(rows) // count]


def interleaved(parts: Sequence[Tensor]) -> Tensor:
    """Return the rows of all parts `(n, …)` in one order, in which those of each part are evenly spread."""
    places = torch.cat([(torch.arange(len(rows)) + 0.5) / max(1, len(rows)) for rows in parts])
    return torch.cat(list(parts))[places.argsort(stable=True)]


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
