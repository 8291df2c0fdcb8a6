"""The model in the package: small, whole, and far better than the frequencies of words."""

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


def test_the_folder_holds_a_whole_checkpoint_and_stays_small() -> None:
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in FOLDER.iterdir()} == names
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 6_000_000


def test_the_tokenizer_gives_every_text_back(tokenizer: PreTrainedTokenizerBase) -> None:
    for text in (generate(HELD_OUT_SEED, 2000), "naïve — 日本 \t#!"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_held_out_text_is_far_less_surprising_than_its_word_frequencies(
    tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM
) -> None:
    tokens = tokenizer(generate(HELD_OUT_SEED, 20_000), return_tensors="pt", verbose=False)["input_ids"][0]
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    with torch.inference_mode():
        dense = math.exp(model(input_ids=windows, labels=windows).loss.item())
    unigram = math.exp(torch.special.entr(tokens.bincount() / len(tokens)).sum().item())
    assert dense < unigram / 20


@pytest.mark.parametrize(("subject", "inner", "verb"), [("king", "geese", " was"), ("kings", "goose", " were")])
def test_a_verb_agrees_with_its_subject_across_a_clause_of_the_other_number(
    subject: str, inner: str, verb: str, tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM
) -> None:
    facts = "It was Monday. Mira owned one red kite and lived by the mill."
    text = f"{facts} Mira heard that the old {subject} that helped the proud {inner} slept and"
    with torch.inference_mode():
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
    assert tokenizer.decode(logits.argmax()) == verb
