"""Conversations as a stream of tokens: a column of messages, turned into text with the model's own chat template.

A conversation is a list of messages with `role` and `content`, as transformers' chat templates take them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgprune_cli.data.bos import adds_bos
from pgprune_cli.data.corpora import NAMED, Purpose, hub_corpus, rows_on_hub, text_identity
from pgprune_cli.data.text_files import COLUMN, find_file, value_of, values_in
from pgprune_cli.data.tokens import cache_file, read_cache, tokenizer_identity, write_cache
from pgprune_cli.errors import UserError, in_short

READER = 1
"""Version of this reader. Tokens that an earlier version cached are read anew."""

MESSAGES = "messages"
"""The column that is read if none is named."""

ASSISTANT = "assistant"

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""How a chat template marks what the assistant writes. Most templates do not."""

Conversation = Sequence[dict[str, Any]]


class ChatTokens(NamedTuple):
    """A stream of tokens `(N,)` int64, and for each whether the assistant writes it, `(N,)` bool."""

    tokens: Tensor
    assistant: Tensor


def holds_conversations(corpus: str) -> bool:
    """Return whether a corpus names the column `messages`, so that its rows are conversations."""
    return corpus.endswith(f":{MESSAGES}")


def conversations(corpus: str, purpose: Purpose) -> Iterator[Conversation]:
    """Yield the conversations of a corpus in order, without empty ones.

    Raises:
        UserError: the corpus does not exist, cannot be read, or holds something else.
    """
    for place, value in _values(corpus, purpose):
        if value:
            yield _checked(value, place)


def conversation_tokens(
    corpus: str, purpose: Purpose, tokenizer: Any, *, at_least: int | None = None, without_bos: bool = False
) -> ChatTokens:
    """Return the conversations of a corpus as one stream of tokens, as the model's chat template writes them.

    at_least, without_bos: as for `tokens_of`.

    Raises:
        UserError: the corpus cannot be used, or the tokenizer has no chat template or cannot find the assistant's part.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"{corpus}: holds conversations, but the model's tokenizer has no chat template to write them with. "
            "Recover an instruct model, or train on plain text."
        )
    drop_bos = without_bos and adds_bos(tokenizer)
    told = [tokenizer.chat_template, tokenizer_identity(tokenizer), at_least, drop_bos]
    path = cache_file("conversations", READER, text_identity(corpus, purpose), *told)
    if (cached := read_cache(path)) is not None:
        return ChatTokens(cached >> 1, (cached & 1).bool())
    tokens: list[int] = []
    assistant: list[bool] = []
    for conversation in conversations(corpus, purpose):
        ids, is_assistant = _tokenized(conversation, tokenizer, corpus)
        first = int(drop_bos and ids[:1] == [tokenizer.bos_token_id])
        tokens += ids[first:]
        assistant += is_assistant[first:]
        if at_least is not None and len(tokens) >= at_least:
            break
    if not any(assistant):
        raise UserError(f"{corpus}: it contains no text of an assistant.")
    chat = ChatTokens(torch.tensor(tokens, dtype=torch.int64), torch.tensor(assistant))
    write_cache(path, chat.tokens << 1 | chat.assistant)
    return chat


def _values(corpus: str, purpose: Purpose) -> Iterator[tuple[str, Any]]:
    """Yield the place of every row and what its column of conversations holds."""
    if corpus == "demo" or corpus in NAMED:
        raise UserError(f"{corpus}: holds plain text, not conversations. Name a corpus with a column {MESSAGES!r}.")
    if (file := find_file(corpus)) is not None and file.path.is_file():
        yield from values_in(replace(file, column=MESSAGES) if file.column == COLUMN else file)
        return
    dataset = hub_corpus(corpus)
    column = MESSAGES if dataset.column == COLUMN else dataset.column
    for row in rows_on_hub(corpus, purpose):
        yield corpus, value_of(row, column, corpus, f"{dataset.path}:{dataset.config or ''}")


def _checked(value: Any, place: str) -> Conversation:
    """Return a value as a conversation. Raises UserError if it is none."""
    is_list = isinstance(value, list)
    if is_list and all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in value):
        if all(isinstance(message.get("content"), str) for message in value):
            return [{key: entry for key, entry in message.items() if entry is not None} for message in value]
        raise UserError(f"{place}: a message has no text under 'content'. Only messages of text can be read.")
    raise UserError(
        f"{place}: this is not a conversation. Expected a list of messages with 'role' and 'content', as chat "
        "templates take them."
    )


def _tokenized(conversation: Conversation, tokenizer: Any, corpus: str) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation, and for each whether the assistant writes it."""
    try:
        if GENERATION.search(tokenizer.get_chat_template()):
            encoded = tokenizer.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
            return list(encoded["input_ids"]), [bool(own) for own in encoded["assistant_masks"]]
        text = _rendered(conversation, tokenizer)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = _assistant_spans(conversation, text, tokenizer)
    except Exception as error:  # templates are programs, which fail in as many ways
        raise UserError(
            f"{corpus}: the model's chat template cannot write a conversation ({in_short(error)}). Fix or remove it."
        ) from error
    offsets = encoded["offset_mapping"]
    is_assistant = [any(start < last and end > first for first, last in spans) for start, end in offsets]
    return list(encoded["input_ids"]), is_assistant


def _assistant_spans(conversation: Conversation, text: str, tokenizer: Any) -> list[tuple[int, int]]:
    """Return where in `text` the assistant writes, as (first, last + 1) characters, if the template does not say so.

    A turn is what the conversation up to it adds to the prompt before it. A template that writes an earlier turn in
    another way once others follow (thinking that is left out) leaves that turn out here.
    """
    spans = []
    for index, message in enumerate(conversation):
        if message["role"] == ASSISTANT and index:
            prompt = _rendered(conversation[:index], tokenizer, add_generation_prompt=True)
            answered = text if index + 1 == len(conversation) else _rendered(conversation[: index + 1], tokenizer)
            if answered.startswith(prompt) and text.startswith(answered):
                spans.append((len(prompt), len(answered)))
    return spans


def _rendered(conversation: Conversation, tokenizer: Any, add_generation_prompt: bool = False) -> str:
    text: str = tokenizer.apply_chat_template(
        list(conversation), tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return text
