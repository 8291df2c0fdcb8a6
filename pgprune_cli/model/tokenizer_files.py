"""The tokenizer of an export: its files, and the token ids by which it is checked, now and in other versions."""

from __future__ import annotations

import json
from itertools import takewhile
from operator import eq
from pathlib import Path
from typing import Any

from pgprune_cli.errors import UserError
from pgprune_cli.model.loading import load_tokenizer
from pgprune_cli.model.plain_tokenizer import write_plain
from pgprune_cli.model.source import Source
from pgprune_cli.storage.records import read_json, write_json

TOKEN_IDS = "token_ids.json"
"""Texts with their token ids, by which a tokenizer can be checked later, in another version of transformers."""
TEXTS = (
    "The quick brown fox didn't jump over 12345.67 lazy dogs, they're told.",
    "  two spaces,\ttabs\n\n and   newlines \n",
    "def f(x):\n    return x**2  # 100%",
    "Äußerst schön: naïve café, e\u0301te\u0301, ﬁligree and ½",
    "Привет, мир! 你好,世界。 こんにちは 안녕하세요 مرحبا नमस्ते",
    "emoji 😀👩\u200d👩\u200d👧 and symbols ∑≈→ ▁ Ġ <|x|> [INST]",
    "HTTPServer camelCase snake_case IT'S WE'LL",
    "",
    " ",
)
ADDED_TOKENS = 24
"""How many added tokens are tried."""


def write_tokenizer(source: Source, directory: Path) -> None:
    """Write the tokenizer of `source` into the directory of a model whose config.json and copied files are there.

    Nothing is written if `source` has no tokenizer that loads without code of its own. Raises UserError if transformers
    does not give the same token ids for the directory.
    """
    tokenizer = _tokenizer_of(source)
    if tokenizer is None:
        return
    if source.gguf is not None:  # there are no files to copy
        tokenizer.save_pretrained(directory)
    if getattr(tokenizer, "is_fast", False):
        write_plain(tokenizer, directory)
    ids = {text: _encode(tokenizer, text) for text in _texts(tokenizer)}
    write_json(directory / TOKEN_IDS, ids)
    if difference := _difference(directory):
        model_type = read_json(directory / "config.json").get("model_type")
        raise UserError(
            f"{source.name}: its tokenizer cannot be exported with the model type {model_type}: {difference}. "
            "Search with budget.scope: global, whose export has a model type of its own."
        )


def faults_of_tokenizer(directory: Path) -> list[str]:
    """Return a line if the tokenizer in a directory gives other token ids than those that are stored beside it."""
    difference = _difference(directory) if (directory / TOKEN_IDS).exists() else None
    return [f"{directory}: {difference}. Use the version of the export."] if difference else []


def _difference(directory: Path) -> str | None:
    """Return how the tokenizer in a directory differs from the stored token ids, as a part of a sentence."""
    import transformers

    tokenizer = load_tokenizer(Source(str(directory), directory, None))
    for text, expected in read_json(directory / TOKEN_IDS).items():
        found = _encode(tokenizer, text)
        if found != expected:
            same = sum(1 for _ in takewhile(bool, map(eq, found, expected)))
            here, there = (", ".join(map(str, ids[same : same + 3])) or "none" for ids in (found, expected))
            quoted = json.dumps(text, ensure_ascii=False)
            return (
                f"transformers {transformers.__version__} turns {quoted} into other token ids than those of the base "
                f"model ({here} in place of {there}, after {same} equal ones)"
            )
    return None


def _tokenizer_of(source: Source) -> Any:
    """Return the tokenizer of a model, None if it has none or one that pgprune cannot load."""
    try:
        return load_tokenizer(source)
    except UserError:
        return None


def _texts(tokenizer: Any) -> list[str]:
    """Return the texts that are tried: letters of many kinds, and added tokens between them."""
    added = sorted(set(map(str, tokenizer.get_added_vocab())))[:ADDED_TOKENS]
    return [*TEXTS, *(f"the dog{token} x {token}y" for token in added)]


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])
