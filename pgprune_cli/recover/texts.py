"""The text of a recovery: windows to train on, and held-out windows that choose the checkpoint.

The corpus is read as that of a calibration is. `recover.turns: assistant`, or a column `messages`, makes it a corpus of
conversations, which become text with the model's own chat template.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgprune_cli.data.bos import bos_token
from pgprune_cli.data.conversations import conversation_tokens, holds_conversations
from pgprune_cli.data.corpora import Purpose, text_identity
from pgprune_cli.data.tokens import check_vocabulary, tokens_of
from pgprune_cli.data.windows import cut_windows, heldout_rows, spread, text_tokens_in
from pgprune_cli.errors import UserError
from pgprune_cli.model.context import refuse_longer_windows
from pgprune_cli.model.families import begins_with_bos
from pgprune_cli.recipe.schema import Recipe, name_and_text


@dataclass(frozen=True)
class RecoveryText:
    """The windows of a recovery.

    windows: `(N + H, seqlen)` int64, the N windows that are trained on in the order of the text, then the held-out
    ones; heldout: H; trained: `(N + H, seqlen)` bool, True at the positions whose prediction is trained on because an
    assistant's token follows, None if all are; bos: the token that every window begins with, None if windows hold only
    the text; digest: sha256 of all of this, as hex.
    """

    windows: Tensor
    heldout: int
    trained: Tensor | None
    bos: int | None
    digest: str

    @classmethod
    def of(cls, windows: Tensor, heldout: int, trained: Tensor | None = None, bos: int | None = None) -> RecoveryText:
        """Return the text with its digest."""
        digest = hashlib.sha256(f"{tuple(windows.shape)} {heldout} {bos} {trained is not None}".encode())
        digest.update(windows.contiguous().numpy().tobytes())
        if trained is not None:
            digest.update(trained.contiguous().numpy().tobytes())
        return cls(windows, heldout, trained, bos, digest.hexdigest())

    @property
    def training(self) -> int:
        """The number N of windows that are trained on."""
        return len(self.windows) - self.heldout

    @property
    def text_tokens(self) -> int:
        """Tokens of the text in a window, without BOS."""
        return text_tokens_in(self.windows.shape[1], self.bos)

    def window(self, row: int, shift: int) -> Tensor:
        """Return the window `(seqlen,)` that begins `shift` tokens of text behind that of a row that is trained on.

        It ends in the next row. After the last one comes the first.
        """
        first = self.windows.shape[1] - self.text_tokens
        own, following = self.windows[row], self.windows[(row + 1) % self.training]
        return torch.cat([own[:first], own[first + shift :], following[first : first + shift]])


class _Stream(NamedTuple):
    """The tokens `(n,)` int64 of a corpus, and for each whether it is trained on, `(n,)` bool, or None for all."""

    tokens: Tensor
    trained: Tensor | None


def recovery_corpus(recipe: Recipe) -> str:
    """Return the corpus that the recovery trains on."""
    return recipe.recover.corpus or recipe.calibration.corpus


def recovery_text(recipe: Recipe, name: str, config: Any, tokenizer: Any) -> RecoveryText:
    """Read the text that a model is trained on: enough for `recover.tokens` tokens, or all of a shorter corpus.

    name, config, tokenizer: of the model, for error messages, the longest context and the BOS token.

    Raises:
        UserError: the corpus is evaluation text, does not exist, cannot be read or is too short; the windows are longer
            than the model's context; or the tokenizer does not fit the model or has no chat template.
    """
    settings, corpus = recipe.recover, recovery_corpus(recipe)
    refuse_evaluation_text(recipe)
    refuse_longer_windows(config, name, {"recover.seqlen": settings.seqlen})
    bos = bos_token(recipe.calibration.bos, tokenizer, begins_with_bos(config.model_type), name)
    wanted = -(-settings.tokens // settings.seqlen)
    text_tokens = text_tokens_in(settings.seqlen, bos)
    stream = _read(recipe, tokenizer, (wanted + settings.heldout) * text_tokens, bos)
    check_vocabulary(stream.tokens, corpus, config.vocab_size, bos)
    windows = cut_windows(stream.tokens, settings.seqlen, bos)
    trained = None if stream.trained is None else _trained_positions(stream.trained, settings.seqlen, bos)
    if trained is not None:
        windows, trained = windows[trained.any(1)], trained[trained.any(1)]
    if len(windows) < settings.heldout + settings.batch:
        raise UserError(
            f"{corpus}: {len(stream.tokens):,} tokens make {len(windows):,} windows of {settings.seqlen} tokens to "
            f"train on, too few for {settings.heldout} held-out ones and a batch of {settings.batch}. Use a longer "
            "text, or lower recover.heldout, recover.batch or recover.seqlen."
        )
    is_heldout = heldout_rows(len(windows), settings.heldout)
    rows = torch.arange(len(windows))
    chosen = torch.cat([spread(rows[~is_heldout], wanted), rows[is_heldout]])
    return RecoveryText.of(windows[chosen], settings.heldout, None if trained is None else trained[chosen], bos)


def refuse_evaluation_text(recipe: Recipe) -> None:
    """Raise UserError if the recovery would train on a text that the recipe evaluates on.

    Named corpora and data sets have one split for each, so only files can be the same.
    """
    corpus = recovery_corpus(recipe)
    identity = _identity(corpus, "calibration")
    for evaluated in recipe.evaluation.corpora:
        _, text = name_and_text(evaluated)
        if identity is not None and identity == _identity(text, "evaluation"):
            raise UserError(
                f"{corpus}: is evaluation text (evaluation.corpora: {evaluated}), and a model must not be trained on "
                "what measures it. Set recover.corpus to another text."
            )


def _identity(corpus: str, purpose: Purpose) -> str | None:
    """Return the identity of a text, None if it does not exist, which is an error only where it is read."""
    try:
        return text_identity(corpus, purpose)
    except UserError:
        return None


def _read(recipe: Recipe, tokenizer: Any, at_least: int, bos: int | None) -> _Stream:
    settings, corpus = recipe.recover, recovery_corpus(recipe)
    if settings.turns == "all" and not holds_conversations(corpus):
        tokens = tokens_of(corpus, "calibration", tokenizer, at_least=at_least, without_bos=bos is not None)
        return _Stream(tokens, None)
    chat = conversation_tokens(corpus, "calibration", tokenizer, at_least=at_least, without_bos=bos is not None)
    return _Stream(chat.tokens, chat.assistant if settings.turns == "assistant" else None)


def _trained_positions(assistant: Tensor, seqlen: int, bos: int | None) -> Tensor:
    """Return for windows of a stream which positions `(W, seqlen)` predict a token that is the assistant's.

    assistant: whether each token of the stream is, `(n,)` bool.
    """
    followed = torch.cat([assistant[1:], assistant.new_zeros(1)])
    rows = cut_windows(followed, text_tokens_in(seqlen, bos))
    if bos is None:
        return rows
    first = cut_windows(assistant, text_tokens_in(seqlen, bos))[:, :1]  # BOS predicts the first token of the text
    return torch.cat([first, rows], dim=1)
