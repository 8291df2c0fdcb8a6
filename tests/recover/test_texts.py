"""The text of a recovery: bounded, spread, never evaluation text, and with the assistant's turns marked."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.messages import refused
from helpers.models import save_tokenizer, tiny_config
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from pgprune_cli.recipe.reader import find, load
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.recover.schedule import WindowOrder, share_of_window
from pgprune_cli.recover.texts import RecoveryText, recovery_text

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
VOCABULARY = 300


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPRUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, size=VOCABULARY)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def config_of(architecture: str = "llama-gqa") -> Any:
    config = tiny_config(architecture)
    config.vocab_size = VOCABULARY
    return config


def recipe_for(corpus: Path | str, **recover: Any) -> Recipe:
    recipe = load(find("demo"))
    settings = {"corpus": str(corpus), "tokens": 160, "seqlen": 16, "batch": 2, "heldout": 3} | recover
    return replace(recipe, recover=replace(recipe.recover, **settings))


def read(recipe: Recipe, tokenizer: Any, config: Any = None) -> RecoveryText:
    return recovery_text(recipe, "the model", config or config_of(), tokenizer)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    texts = [f"Fox {index} has {index**3} dens and {index**4} paths." for index in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_text_holds_as_many_windows_as_are_trained_on_and_heldout_ones(corpus: Path, tokenizer: Any) -> None:
    text = read(recipe_for(corpus), tokenizer)
    assert text.windows.shape == (10 + 3, 16)
    assert (text.training, text.heldout, text.trained, text.bos) == (10, 3, None, None)
    rows = text.windows.tolist()
    assert not [row for row in rows[10:] if row in rows[:10]]
    stream = tokenizer.decode(text.windows[0])
    assert stream.startswith("Fox ")
    short = read(recipe_for(corpus, tokens=10**6), tokenizer)
    assert len(text.windows) < len(short.windows) < 10**6 // 16


def test_tokens_bound_what_is_read(corpus: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def tokens_of(*_: Any, at_least: int, **__: Any) -> torch.Tensor:
        asked.append(at_least)
        return torch.arange(at_least) % 96

    monkeypatch.setattr("pgprune_cli.recover.texts.tokens_of", tokens_of)
    read(recipe_for(corpus), tokenizer)
    assert asked == [(10 + 3) * 16]


def test_corpus_of_the_calibration_is_read_by_default(corpus: Path, tokenizer: Any) -> None:
    named = recipe_for(corpus)
    default = replace(recipe_for(""), calibration=replace(named.calibration, corpus=str(corpus)))
    assert torch.equal(read(default, tokenizer).windows, read(named, tokenizer).windows)


def test_digest_changes_with_everything_that_is_trained_on(corpus: Path, tokenizer: Any) -> None:
    text = read(recipe_for(corpus), tokenizer)
    trained = torch.ones(text.windows.shape, dtype=torch.bool)
    others = [
        RecoveryText.of(text.windows, 2),
        RecoveryText.of(text.windows.flip(0), 3),
        RecoveryText.of(text.windows, 3, trained),
        RecoveryText.of(text.windows, 3, bos=1),
    ]
    assert len({text.digest, *(other.digest for other in others)}) == 5
    assert RecoveryText.of(text.windows, 3).digest == text.digest


def test_windows_begin_with_bos_if_the_recipe_says_so(corpus: Path, tokenizer: Any) -> None:
    recipe = recipe_for(corpus)
    text = read(replace(recipe, calibration=replace(recipe.calibration, bos=True)), tokenizer)
    assert text.windows[:, 0].tolist() == [tokenizer.bos_token_id] * len(text.windows)
    assert text.bos == tokenizer.bos_token_id


@pytest.mark.parametrize(("architecture", "has_bos"), [("gemma2", True), ("llama-gqa", False)])
def test_windows_begin_with_bos_if_the_family_was_trained_so(
    architecture: str, has_bos: bool, corpus: Path, tokenizer: Any
) -> None:
    recipe = recipe_for(corpus)
    assert recipe.calibration.bos == "auto"
    tokenizer = copy.deepcopy(tokenizer)
    special = [(tokenizer.bos_token, tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{tokenizer.bos_token} $A", special_tokens=special)
    text = read(recipe, tokenizer, config_of(architecture))
    assert (text.bos == tokenizer.bos_token_id) == has_bos
    assert (text.windows[:, 0] == tokenizer.bos_token_id).all() == has_bos


@pytest.mark.parametrize("bos", [False, True], ids=["without-bos", "with-bos"])
def test_positions_before_an_assistants_token_are_trained(bos: bool, tokenizer: Any, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "ZZZZ"}]
    corpus = tmp_path / "talks.jsonl"
    corpus.write_text((json.dumps({"messages": talk}) + "\n") * 20)
    recipe = recipe_for(corpus, turns="assistant")
    text = read(replace(recipe, calibration=replace(recipe.calibration, bos=bos)), tokenizer)
    assert text.trained is not None
    answers = torch.tensor(["Z" in tokenizer.decode(token) for token in range(VOCABULARY)])
    followed = answers[text.windows[:, 1:]]
    assert torch.equal(text.trained[:, :-1], followed)
    assert text.trained.any(1).all()  # windows without an answer are left out
    everything = read(recipe_for(f"{corpus}:messages"), tokenizer)
    assert everything.trained is None
    assert "<assistant>ZZZZ<user>" in tokenizer.decode(everything.windows.flatten())


def test_text_that_is_evaluated_on_is_refused(corpus: Path, tokenizer: Any) -> None:
    copy = corpus.with_name("copy.jsonl")
    copy.write_bytes(corpus.read_bytes())
    recipe = recipe_for(corpus)
    evaluated = replace(recipe.evaluation, corpora=("wikitext2", "missing=none.txt", f"mine={copy}"))
    with refused("text.jsonl", "evaluation.corpora", "copy.jsonl"):
        read(replace(recipe, evaluation=evaluated), tokenizer)
    read(replace(recipe, evaluation=replace(evaluated, corpora=("wikitext2", f"{copy}:title"))), tokenizer)


def test_texts_and_windows_that_do_not_fit_are_refused(corpus: Path, tokenizer: Any) -> None:
    with refused("text.jsonl", "windows of 128 tokens", "9 held-out", "batch of 30"):
        read(recipe_for(corpus, seqlen=128, batch=30, heldout=9), tokenizer)
    with refused("recover.seqlen", "128 tokens"):
        read(recipe_for(corpus, seqlen=256), tokenizer)
    small = config_of()
    small.vocab_size = 20
    with refused("text.jsonl", "20 embeddings"):
        read(recipe_for(corpus), tokenizer, small)
    with refused("text.jsonl", "'messages'"):
        read(recipe_for(corpus, turns="assistant"), tokenizer)


# --- the order of the windows


def numbered(bos: int | None = None) -> RecoveryText:
    """Return 5 windows of 8 numbered tokens to train on and 2 held-out ones, all with BOS in front if there is one."""
    rows = torch.arange(56).view(7, 8)
    return RecoveryText.of(rows if bos is None else torch.cat([torch.full((7, 1), bos), rows], dim=1), 2, bos=bos)


@pytest.mark.parametrize("bos", [None, 99])
def test_every_reading_has_each_token_once_and_begins_elsewhere(bos: int | None) -> None:
    order = WindowOrder(numbered(bos), 4 * 5, seed=3, shifted=True)
    items = [order[index]["input_ids"].tolist() for index in range(len(order))]
    readings = [items[first : first + 5] for first in range(0, 20, 5)]
    for reading, begin in zip(readings, (0, 4, 2, 6), strict=True):
        assert all(window.pop(0) == bos for window in reading if bos is not None)
        assert sorted(token for window in reading for token in window) == list(range(40))
        assert sorted(window[0] % 8 for window in reading) == [begin] * 5
        assert all((after - before) % 40 == 1 for window in reading for before, after in pairwise(window))
    assert len({tuple(window[0] // 8 for window in reading) for reading in readings}) > 1


def test_windows_stay_what_they_are_unless_they_are_shifted() -> None:
    text = numbered()
    order = WindowOrder(text, 3 * 5, seed=3, shifted=False)
    for index in range(len(order)):
        item = order[index]
        assert torch.equal(item["input_ids"], text.windows[item["rows"]])


def test_shares_of_a_window_halve_the_widest_gap() -> None:
    assert [share_of_window(reading) for reading in range(8)] == [0, 1 / 2, 1 / 4, 3 / 4, 1 / 8, 5 / 8, 3 / 8, 7 / 8]
