"""scripts/sample_text.py: text that a model draws from its own distribution."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.models import save_tokenizer
from helpers.scripts import script_module

from pgprune_cli.data.tokens import tokens_of
from pgprune_cli.errors import UserError
from pgprune_cli.model.loading import load_tokenizer
from pgprune_cli.model.source import resolve

sample_text = script_module("sample_text")
SMALL = ["--documents", "6", "--tokens", "16", "--batch", "4"]


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    directory = Path(shutil.copytree(saved, tmp_path / "model"))
    save_tokenizer(directory)
    return directory


def written(model: Path, out: Path, *words: str) -> list[str]:
    """Return the texts that the program writes."""
    sample_text.main([str(model), "--out", str(out), *SMALL, *words])
    return [json.loads(line)["text"] for line in out.read_text("utf-8").splitlines()]


def test_a_seed_writes_the_same_documents_again(model: Path, tmp_path: Path) -> None:
    texts = written(model, tmp_path / "a.jsonl")
    assert len(texts) == 6
    assert len(set(texts)) == 6
    assert not any("<|endoftext|>" in text for text in texts)
    assert written(model, tmp_path / "b.jsonl") == texts
    assert written(model, tmp_path / "a.jsonl", "--seed", "1") != texts


def test_the_file_is_a_text_to_calibrate_on(model: Path, tmp_path: Path) -> None:
    written(model, tmp_path / "a.jsonl")
    tokens = tokens_of(str(tmp_path / "a.jsonl"), "calibration", load_tokenizer(resolve(str(model))))
    assert len(tokens) >= 6 * 8  # cut letters and special tokens are read back as fewer or more tokens


def test_documents_begin_behind_the_separator_of_the_training_or_the_named_token(model: Path) -> None:
    tokenizer = load_tokenizer(resolve(str(model)))
    assert sample_text.chosen_token(tokenizer, None, "m") == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert sample_text.chosen_token(tokenizer, "</s>", "m") == tokenizer.eos_token_id
    with pytest.raises(UserError, match=r"--first: the tokenizer has no token <none>"):
        sample_text.chosen_token(tokenizer, "<none>", "m")


@pytest.mark.parametrize("words", [["--documents", "0"], ["--tokens", "-1"], ["--batch", "x"], ["--dtype", "int3"]])
def test_bad_options_are_refused(model: Path, tmp_path: Path, words: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        written(model, tmp_path / "a.jsonl", *words)
    assert stopped.value.code == 2
    assert not (tmp_path / "a.jsonl").exists()


def test_an_interrupted_program_leaves_the_old_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.jsonl"
    out.write_text("old")

    def stopped(*arguments: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_text, "sampled_batches", stopped)
    with pytest.raises(KeyboardInterrupt):
        written(model, out)
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.glob("*a.jsonl*")] == ["a.jsonl"]
