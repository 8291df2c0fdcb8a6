"""BOS in front of windows: `auto` follows tokenizer and family, and no window has it twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.messages import refused
from helpers.models import save_tokenizer
from transformers import AutoTokenizer

from pgprune_cli.data.bos import adds_bos, bos_token
from pgprune_cli.data.tokens import tokens_of
from pgprune_cli.data.windows import calibration_text

BOS = 1


def tokenizer_that(tmp_path: Path, adds: bool) -> Any:
    save_tokenizer(tmp_path / "tokenizer", **({"add_bos_token": True} if adds else {}))
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_auto_needs_a_tokenizer_that_adds_bos_and_a_family_that_was_trained_with_it(tmp_path, adds, trained) -> None:
    tokenizer = tokenizer_that(tmp_path, adds)
    assert adds_bos(tokenizer) == adds
    assert bos_token("auto", tokenizer, trained, "m") == (BOS if adds and trained else None)
    assert bos_token(True, tokenizer, trained, "m") == BOS
    assert bos_token(False, tokenizer, trained, "m") is None


def test_bos_is_refused_if_the_tokenizer_has_none(tmp_path) -> None:
    tokenizer = tokenizer_that(tmp_path, adds=False)
    tokenizer.bos_token = None
    assert bos_token("auto", tokenizer, True, "mine") is None
    assert bos_token(False, tokenizer, True, "mine") is None
    with refused("mine: ", "no BOS token", "false"):
        bos_token(True, tokenizer, False, "mine")


def test_a_stream_without_bos_has_the_same_text(tmp_path) -> None:
    tokenizer = tokenizer_that(tmp_path, adds=True)
    Path("a.jsonl").write_text('{"text": "ab a"}\n{"text": "b ab"}\n')
    with_bos = tokens_of("a.jsonl", "calibration", tokenizer).tolist()
    without = tokens_of("a.jsonl", "calibration", tokenizer, without_bos=True).tolist()
    assert with_bos.count(BOS) == 2 and with_bos[0] == BOS
    assert without == [token for token in with_bos if token != BOS]
    assert tokens_of("a.jsonl", "calibration", tokenizer).tolist() == with_bos  # each has its own place in the cache


def test_a_tokenizer_that_adds_no_bos_loses_no_token(tmp_path) -> None:
    tokenizer = tokenizer_that(tmp_path, adds=False)
    Path("a.txt").write_text("<s>ab ab")  # the text itself begins with the token
    tokens = tokens_of("a.txt", "calibration", tokenizer).tolist()
    assert tokens[0] == BOS
    assert tokens_of("a.txt", "calibration", tokenizer, without_bos=True).tolist() == tokens


@pytest.mark.parametrize("adds", [True, False])
def test_windows_of_many_documents_have_bos_only_in_front(tmp_path, adds) -> None:
    tokenizer = tokenizer_that(tmp_path, adds)
    Path("a.jsonl").write_text('{"text": "ab a b a"}\n' * 40)
    text = calibration_text("a.jsonl", tokenizer, windows=8, heldout=2, seqlen=6, bos=BOS)
    for windows in (text.search, text.heldout, text.long_windows(4, 20), text.long_windows(4, 10**6)):
        assert (windows[:, 0] == BOS).all()
        assert not (windows[:, 1:] == BOS).any()
