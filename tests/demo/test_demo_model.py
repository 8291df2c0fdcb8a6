"""The demo model: a complete, small checkpoint that predicts far better than word frequencies do."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

import pgprune_cli.demo
from pgprune_cli.demo.grammar import generate

FOLDER = Path(pgprune_cli.demo.__file__).parent / "model"
HELD_OUT_SEED = 1
WINDOW = 128


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


def test_the_demo_model_is_a_complete_and_small_checkpoint() -> None:
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in FOLDER.iterdir()} == names
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 6_000_000


def test_the_tokenizer_decodes_every_text_unchanged(tokenizer: PreTrainedTokenizerBase) -> None:
    for text in (generate(HELD_OUT_SEED, 2000), "naïve — 日本 \t#!"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_demo_model_predicts_unseen_text_far_better_than_token_frequencies(
    tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM
) -> None:
    tokens = tokenizer(generate(HELD_OUT_SEED, 20_000), return_tensors="pt", verbose=False)["input_ids"][0]
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    with torch.inference_mode():
        dense = math.exp(model(input_ids=windows, labels=windows).loss.item())
    unigram = math.exp(torch.special.entr(tokens.bincount() / len(tokens)).sum().item())
    assert dense < unigram / 20


@pytest.mark.parametrize(("subject", "inner", "verb"), [("king", "geese", " was"), ("kings", "goose", " were")])
def test_the_demo_model_makes_a_verb_agree_with_a_distant_subject(
    subject: str, inner: str, verb: str, tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM
) -> None:
    facts = "It was Monday. Mira owned one red kite and lived by the mill."
    text = f"{facts} Mira heard that the old {subject} that helped the proud {inner} slept and"
    with torch.inference_mode():
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
    assert tokenizer.decode(logits.argmax()) == verb
