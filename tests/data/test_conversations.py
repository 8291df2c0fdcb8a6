"""Conversations become text with the model's chat template, and the assistant's tokens are known."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.messages import refused
from helpers.models import save_tokenizer
from transformers import AutoTokenizer

from pgprune_cli.data.conversations import conversation_tokens, holds_conversations

TURN = "{{ '<' + message['role'] + '>' }}"
MARKED = (
    "{% for message in messages %}" + TURN + "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
"""A template that marks what the assistant writes."""
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
"""The same, as most templates are: without marks."""

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A fox."},
    {"role": "user", "content": "Really?"},
    {"role": "assistant", "content": "Yes, I am."},
]


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("chat")
    save_tokenizer(folder, size=300)
    return AutoTokenizer.from_pretrained(folder)


def write_talks(path: Path, talks: list[Any], column: str = "messages") -> str:
    path.write_text("".join(json.dumps({column: talk, "id": index}) + "\n" for index, talk in enumerate(talks)))
    return str(path)


@pytest.mark.parametrize("template", [MARKED, PLAIN], ids=["with-generation", "without-generation"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "hub"])
def test_assistant_tokens_are_those_of_its_turns(
    template: str, kind: str, chat_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat_tokenizer.chat_template = template
    talks, corpus = [TALK, TALK[1:3]], f"talks.{kind}"
    match kind:
        case "jsonl":
            write_talks(Path(corpus), talks)
        case "json":
            Path(corpus).write_text(json.dumps([{"messages": talk} for talk in talks]))
        case "parquet":
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.table({"messages": talks}), corpus)
        case "hub":
            corpus = "owner/talks"
            monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"messages": talk} for talk in talks])
    chat = conversation_tokens(corpus, "calibration", chat_tokenizer)
    text = [chat_tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks]
    assert chat_tokenizer.decode(chat.tokens) == "".join(text)
    assert chat_tokenizer.decode(chat.tokens[chat.assistant]) == "A fox.</s>Yes, I am.</s>A fox.</s>"
    again = conversation_tokens(corpus, "calibration", chat_tokenizer)  # from the cache
    assert torch.equal(again.tokens, chat.tokens)
    assert torch.equal(again.assistant, chat.assistant)


def test_reading_stops_once_there_are_enough_tokens_and_bos_is_left_out(chat_tokenizer: Any) -> None:
    chat_tokenizer.chat_template = "{{ bos_token }}" + PLAIN
    corpus = write_talks(Path("talks.jsonl"), [TALK, TALK, "not a conversation"], "turns") + ":turns"
    whole = conversation_tokens(corpus, "calibration", chat_tokenizer, at_least=1)
    assert whole.tokens[0] == chat_tokenizer.bos_token_id
    assert chat_tokenizer.decode(whole.tokens) == chat_tokenizer.apply_chat_template(TALK, tokenize=False)
    assert not holds_conversations(corpus)
    assert holds_conversations("talks.jsonl:messages")


def test_turns_that_a_template_rewrites_later_are_left_out(chat_tokenizer: Any) -> None:
    thinking = "{% for message in messages %}" + TURN + "{% if loop.last and message['role'] == 'assistant' %}[think]"
    chat_tokenizer.chat_template = (
        thinking + "{% endif %}{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = conversation_tokens(write_talks(Path("talks.jsonl"), [TALK]), "calibration", chat_tokenizer)
    assert chat_tokenizer.decode(chat.tokens[chat.assistant]) == "[think]Yes, I am."


@pytest.mark.parametrize(
    ("talk", "facts"),
    [
        ("a text", ("talks.jsonl:1", "not a conversation")),
        ([{"from": "human", "value": "Hi"}], ("talks.jsonl:1", "'role' and 'content'")),
        ([{"role": "user", "content": [{"type": "image"}]}], ("talks.jsonl:1", "no text under 'content'")),
        ([{"role": "user", "content": "Hi"}], ("talks.jsonl", "no text of an assistant")),
    ],
    ids=["text", "other-keys", "image", "no-assistant"],
)
def test_rows_that_are_no_conversations_are_refused(talk: Any, facts: tuple[str, ...], chat_tokenizer: Any) -> None:
    chat_tokenizer.chat_template = PLAIN
    with refused(*facts):
        conversation_tokens(write_talks(Path("talks.jsonl"), [talk]), "calibration", chat_tokenizer)


def test_corpora_without_conversations_are_refused(chat_tokenizer: Any) -> None:
    chat_tokenizer.chat_template = PLAIN
    Path("plain.txt").write_text("A text.")
    Path("texts.jsonl").write_text('{"text": "A text."}\n')
    for corpus, fact in {
        "demo": "plain text",
        "plain.txt": "no columns",
        "texts.jsonl": "no column 'messages'",
    }.items():
        with refused(corpus, fact):
            conversation_tokens(corpus, "calibration", chat_tokenizer)


def test_a_model_without_a_working_chat_template_is_refused(chat_tokenizer: Any) -> None:
    corpus = write_talks(Path("talks.jsonl"), [TALK])
    chat_tokenizer.chat_template = None
    with refused("talks.jsonl", "no chat template"):
        conversation_tokens(corpus, "calibration", chat_tokenizer)
    chat_tokenizer.chat_template = "{{ raise_exception('no system messages') }}"
    with refused("talks.jsonl", "no system messages"):
        conversation_tokens(corpus, "calibration", chat_tokenizer)
