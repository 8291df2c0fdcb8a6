"""Text to tokens, tokenised once and cached."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgprune_cli.console.stderr import STDERR
from pgprune_cli.data.corpora import Purpose, documents, text_identity
from pgprune_cli.errors import UserError
from pgprune_cli.storage.atomic import write_bytes
from pgprune_cli.storage.records import CHECKSUM, metadata, read_tensors

DOCUMENTS_AT_A_TIME = 64


def cache_directory() -> Path:
    """Where tokenised corpora are kept: $PGPRUNE_CACHE, else pgprune under the user's cache directory."""
    if "PGPRUNE_CACHE" in os.environ:
        return Path(os.environ["PGPRUNE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pgprune"


def tokens_of(corpus: str, purpose: Purpose, tokenizer: Any, wanted: int | None = None) -> Tensor:
    """The corpus as one stream of tokens `(N,)` int64, at least `wanted` of them where the corpus has as many.

    Raises UserError for a corpus that is not there, cannot be read, is empty or cannot be reached.
    """
    identity = text_identity(corpus, purpose)
    key = hashlib.sha256(json.dumps([identity, wanted, _tokenizer_identity(tokenizer)]).encode()).hexdigest()
    cached = cache_directory() / "tokens" / f"{key[:32]}.safetensors"
    if (tokens := _cached(cached)) is not None:
        return tokens
    tokens = _tokenise(documents(corpus, purpose), tokenizer, wanted)
    if not tokens.numel():
        raise UserError(f"{corpus}: holds no text")
    _keep(cached, tokens)
    return tokens


def _cached(path: Path) -> Tensor | None:
    """The tokens that `_keep` kept, None where there are none or they are not whole: they can be made again."""
    try:
        found = read_tensors(path)["tokens"].int()
        whole = metadata(path).get(CHECKSUM) == _digest(found)
    except (UserError, OSError, KeyError):
        return None
    return found.long() if whole else None


def _keep(path: Path, tokens: Tensor) -> None:
    """Without a place to keep them in, a run goes on and says so."""
    from safetensors.torch import save

    try:
        write_bytes(path, save({"tokens": tokens.int()}, {CHECKSUM: _digest(tokens.int())}))
    except OSError as error:
        print(f"pgprune: {path}: {error.strerror or error}; the tokens of the text are not kept", file=STDERR)


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()


def check_vocabulary(tokens: Tensor, corpus: str, embeddings: int) -> None:
    """Raises UserError where a corpus was cut into tokens that a model of so many embeddings has none of."""
    if tokens.numel() and int(tokens.max()) >= embeddings:
        raise UserError(
            f"{corpus}: its tokens go up to number {int(tokens.max())}, and the model has {embeddings} embeddings: "
            "the tokenizer beside it is another model's"
        )


def _tokenizer_identity(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(f"{described}{tokenizer.bos_token}{tokenizer.eos_token}".encode()).hexdigest()


def _tokenise(documents: Iterator[str], tokenizer: Any, wanted: int | None) -> Tensor:
    pieces: list[list[int]] = []
    total = 0
    while some := [document for _, document in zip(range(DOCUMENTS_AT_A_TIME), documents, strict=False)]:
        for ids in tokenizer(some, verbose=False)["input_ids"]:
            pieces.append(ids)
            total += len(ids)
        if wanted is not None and total >= wanted:
            break
    return torch.tensor([token for piece in pieces for token in piece], dtype=torch.int64)
