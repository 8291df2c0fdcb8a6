"""Short texts, and what a tokenizer makes of them."""

from __future__ import annotations

from typing import Any

TEXTS = ["Mira owned one red kite.", "The old king slept.", "It was Monday and the geese were loud."]


class CountingTokenizer:
    """Counts the texts that a tokenizer gets."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.texts = tokenizer, 0

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.texts += len(texts)
        return self.tokenizer(texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def token_ids(tokenizer: Any, texts: list[str]) -> list[int]:
    """Return the tokens of all texts, each tokenized by itself."""
    return [token for text in texts for token in tokenizer(text)["input_ids"]]
