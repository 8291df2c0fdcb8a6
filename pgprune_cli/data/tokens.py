"""Tokenize a corpus once, and cache the tokens on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgprune_cli.console.stderr import warn
from pgprune_cli.data.bos import adds_bos
from pgprune_cli.data.corpora import Purpose, documents, text_identity
from pgprune_cli.errors import UserError, in_short
from pgprune_cli.storage.atomic import write_bytes
from pgprune_cli.storage.paths import cache_directory
from pgprune_cli.storage.records import CHECKSUM, metadata, read_tensors

READERS = 2
"""Version of the readers of texts. Tokens that an earlier version cached are read anew."""

DOCUMENTS_PER_CALL = 64
"""How many documents the tokenizer gets at a time."""

PROBE = (
    "The old king owned 1,234.5 km² of land: \"l'été\", и 東京 🙂\n\n\tif x != y:  return  # they're unbelievably kind"
)
"""Ordinary text whose tokens are part of a tokenizer's identity."""

SEPARATOR = "<|endoftext|>"
"""What many models were trained to begin a document behind, even if chats begin with another token."""


def tokens_of(
    corpus: str, purpose: Purpose, tokenizer: Any, *, at_least: int | None = None, without_bos: bool = False
) -> Tensor:
    """Return the corpus as one stream of tokens `(N,)` int64.

    at_least: stop reading once there are this many tokens; None reads the whole corpus. A corpus that is shorter gives
    all it has. without_bos: leave out the BOS token that some tokenizers add to every document, for windows that begin
    with it themselves.

    Raises UserError if the corpus does not exist, cannot be read or reached, or holds no text.
    """
    identity = text_identity(corpus, purpose)
    drop_bos = without_bos and adds_bos(tokenizer)
    path = cache_file(READERS, identity, at_least, tokenizer_identity(tokenizer), drop_bos)
    if (cached := read_cache(path)) is not None:
        return cached
    tokens = _tokenize(documents(corpus, purpose), tokenizer, at_least, drop_bos)
    if not tokens.numel():
        raise UserError(f"{corpus}: it contains no text.")
    write_cache(path, tokens)
    return tokens


def check_vocabulary(tokens: Tensor, corpus: str, embeddings: int, bos: int | None = None) -> None:
    """Raise UserError if a token, or `bos`, has no row in the model's embedding, which has `embeddings` rows."""
    highest = max(int(tokens.max()) if tokens.numel() else -1, -1 if bos is None else bos)
    if highest >= embeddings:
        raise UserError(
            f"{corpus}: its token ids go up to {highest}, but the model has only {embeddings} embeddings. "
            "The tokenizer in the model's directory belongs to another model."
        )


def first_token(tokenizer: Any, name: str, advice: str) -> int:
    """Return the token that a document begins behind: the separator of the training, BOS, or else EOS.

    name, advice: the model and what to do, for the error message. Raises UserError if the tokenizer has none of them.
    """
    known = tokenizer.get_vocab()
    for token in (SEPARATOR, tokenizer.bos_token, tokenizer.eos_token):
        if token in known:
            return int(known[token])
    raise UserError(
        f"{name}: its tokenizer has neither {SEPARATOR} nor BOS nor EOS to begin a document behind. {advice}"
    )


def ordinary_tokens(tokenizer: Any, vocabulary: int) -> Tensor:
    """Return which of the tokens below `vocabulary` stand for text: a mask `(vocabulary,)`.

    Special tokens do not, nor those that only pad the embeddings.
    """
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}
    ordinary = torch.zeros(vocabulary, dtype=torch.bool)
    ordinary[[number for number in tokenizer.get_vocab().values() if number < vocabulary]] = True
    ordinary[[number for number in special if number < vocabulary]] = False
    return ordinary


def cache_file(*settings: object) -> Path:
    """Return where the tokens that these settings decide are cached."""
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    return cache_directory() / "tokens" / f"{key[:32]}.safetensors"


def read_cache(path: Path) -> Tensor | None:
    """Return the cached tokens, or None if there are none or they are damaged: they can be computed again."""
    try:
        tokens = read_tensors(path)["tokens"].int()
        intact = metadata(path).get(CHECKSUM) == _digest(tokens)
    except (UserError, OSError, KeyError):
        return None
    return tokens.long() if intact else None


def write_cache(path: Path, tokens: Tensor) -> None:
    """Cache the tokens. Print a warning if that is not possible; the run does not need the cache."""
    from safetensors.torch import save

    try:
        write_bytes(path, save({"tokens": tokens.int()}, {CHECKSUM: _digest(tokens.int())}))
    except OSError as error:
        warn(f"{path}: cannot cache the tokens of the text ({error.strerror or error}).")


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()


def tokenizer_identity(tokenizer: Any) -> str:
    """Return a digest of what decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    identity = f"{described}{tokenizer.bos_token}{tokenizer.eos_token}{_probed(tokenizer)}"
    return hashlib.sha256(identity.encode()).hexdigest()


def _probed(tokenizer: Any) -> list[int] | None:
    """Return the tokens of a text with every special token. None if the tokenizer cannot write it.

    They show what a description lacks: whether special tokens are split, which ones are added, and the merges.
    """
    try:
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        text = " ".join([PROBE, *sorted({*tokenizer.all_special_tokens, *added})])
        return list(tokenizer.encode(text, verbose=False))
    except Exception:  # a vocabulary without <unk>, which may suffice for the corpus, or a class without these methods
        return None


def _tokenize(documents: Iterator[str], tokenizer: Any, at_least: int | None, drop_bos: bool) -> Tensor:
    """Return the tokens of the documents in order, each tokenized by itself and, if so asked, without its first token.

    Special tokens other than BOS stay as the tokenizer adds them. Raises UserError if the tokenizer fails.
    """
    pieces = [torch.empty(0, dtype=torch.int32)]  # a list of Python's integers takes nine times the memory
    total = 0
    while texts := [document for _, document in zip(range(DOCUMENTS_PER_CALL), documents, strict=False)]:
        try:
            tokenized = tokenizer(texts, verbose=False)["input_ids"]
        except Exception as error:  # the library raises a bare Exception, for example for a vocabulary without <unk>
            raise UserError(
                f"the model's tokenizer does not work ({in_short(error)}). Fetch its files again."
            ) from error
        for ids in tokenized:
            pieces.append(torch.tensor(ids[1:] if drop_bos else ids, dtype=torch.int32))
            total += len(pieces[-1])
        if at_least is not None and total >= at_least:
            break
    return torch.cat(pieces).long()
