"""Reading corpora: local files, data sets on the hub and the demo text, and what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from helpers.messages import refused
from helpers.texts import TEXTS, CountingTokenizer, token_ids
from pyarrow import parquet

from pgprune_cli.data import corpora
from pgprune_cli.data.corpora import NAMED, Purpose
from pgprune_cli.data.tokens import tokens_of
from pgprune_cli.storage.paths import cache_directory

# --- local files


def test_a_text_file_is_one_document(tokenizer: Any) -> None:
    Path("a.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    tokens = tokens_of("a.txt", "calibration", tokenizer)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == token_ids(tokenizer, ["\n".join(TEXTS)])


def test_every_line_of_a_jsonl_file_is_a_document(tokenizer: Any) -> None:
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(TEXTS)]
    Path("a.jsonl").write_text("\n".join([*lines[:2], "", lines[2], ""]))
    assert tokens_of("a.jsonl", "calibration", tokenizer).tolist() == token_ids(tokenizer, TEXTS)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_only_a_newline_ends_a_line_of_a_jsonl_file(separator: str, tokenizer: Any) -> None:
    """Web text is full of U+2028 and U+0085, which JSON allows unescaped and `str.splitlines` splits at."""
    text = f"one{separator}two"
    line = json.dumps({"text": text}, ensure_ascii=False)
    Path("a.jsonl").write_text(f"{line}\r\n{line}\n", encoding="utf-8", newline="")
    assert tokens_of("a.jsonl", "calibration", tokenizer).tolist() == token_ids(tokenizer, [text, text])


def test_every_row_of_a_parquet_file_is_a_document(tokenizer: Any) -> None:
    parquet.write_table(pa.table({"n": [1, 2, 3, 4, 5], "text": [*TEXTS[:2], None, "", TEXTS[2]]}), "a.parquet")
    assert tokens_of("a.parquet", "calibration", tokenizer).tolist() == token_ids(tokenizer, TEXTS)


def test_a_parquet_file_without_a_text_column_is_refused(tokenizer: Any) -> None:
    parquet.write_table(pa.table({"body": ["a"], "n": [1]}), "a.parquet")
    with refused("a.parquet", "'text'", "body, n"):
        tokens_of("a.parquet", "calibration", tokenizer)


def test_a_parquet_file_whose_text_column_holds_numbers_is_refused(tokenizer: Any) -> None:
    parquet.write_table(pa.table({"text": [1, 2]}), "a.parquet")
    with refused("a.parquet", "'text'", "int64"):
        tokens_of("a.parquet", "calibration", tokenizer)


def test_a_damaged_parquet_file_is_refused(tokenizer: Any) -> None:
    Path("a.parquet").write_bytes(b"PAR1 and then nothing")
    with refused("a.parquet"):
        tokens_of("a.parquet", "calibration", tokenizer)


@pytest.mark.parametrize("line", ["{'text': 1}", '{"txt": "a"}', '{"text": 7}', '["text"]', '{"text": "\\ud800"}'])
def test_a_bad_line_of_a_jsonl_file_is_refused_with_its_number(line: str, tokenizer: Any) -> None:
    Path("a.jsonl").write_text(f'{{"text": "good"}}\n\n{line}\n{{"text": "good"}}\n')
    with refused("a.jsonl:3"):
        tokens_of("a.jsonl", "calibration", tokenizer)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_that_is_not_utf8_is_refused(name: str, tokenizer: Any) -> None:
    Path(name).write_bytes(b'{"text": "na' + b"\xefve")
    with refused(name, "UTF-8", "byte 12"):
        tokens_of(name, "calibration", tokenizer)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_an_empty_file_is_refused_every_time(name: str, tokenizer: Any) -> None:
    if name == "a.parquet":
        parquet.write_table(pa.table({"text": pa.array([], pa.string())}), name)
    else:
        Path(name).touch()
    for _ in range(2):
        with refused(name):
            tokens_of(name, "calibration", tokenizer)


@pytest.mark.parametrize("name", ["texts", "./texts", "texts.csv"])
def test_a_directory_and_an_unknown_suffix_are_refused(name: str, tokenizer: Any) -> None:
    Path("texts").mkdir()
    Path("texts.csv").write_text("text\na\n")
    with refused(name, ".txt", ".jsonl", ".parquet"):
        tokens_of(name, "calibration", tokenizer)


@pytest.mark.parametrize(
    "name", ["openwebtext", "wikitext", "missing.txt", "./missing/file.jsonl", "texts/missing.parquet", "a/b/c"]
)
def test_an_unknown_corpus_is_refused_with_the_known_names(name: str, tokenizer: Any) -> None:
    with refused(name, *NAMED, "demo", "owner/name", ".txt"):
        tokens_of(name, "calibration", tokenizer)


@pytest.mark.parametrize("name", ["demo", "wikitext2"])
def test_a_directory_does_not_hide_the_corpus_of_the_same_name(
    name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run directory may be called `demo`."""
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"text": "from the hub"}])
    Path(name).mkdir()
    assert len(tokens_of(name, "calibration", tokenizer, at_least=4)) >= 4


# --- the hub


@pytest.mark.parametrize(
    ("purpose", "split", "option"),
    [("calibration", "train", "calibration.corpus: FILE"), ("evaluation", "validation", "--ppl c4=FILE")],
)
def test_an_unreachable_hub_is_refused_with_the_option_for_a_local_file(
    purpose: Purpose, split: str, option: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach\n  the hub")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with refused("c4: ", "Couldn't reach the hub", split, option):
        tokens_of("c4", purpose, tokenizer)


def test_a_connection_that_breaks_midway_is_refused_and_nothing_is_cached(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaking(*_: object, **__: object) -> Iterator[dict[str, str]]:
        yield {"text": "one"}
        raise ConnectionError("reset")

    monkeypatch.setattr("datasets.load_dataset", breaking)
    with refused("c4: ", "reset"):
        tokens_of("c4", "calibration", tokenizer)
    assert not list(cache_directory().rglob("*.safetensors"))


def test_calibration_and_evaluation_read_different_splits(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(path: str, config: str | None, *, split: str, streaming: bool, revision: str | None) -> list[dict]:
        calls.append((path, config, split, streaming, revision))
        return [{"text": f"{split} one", "sentence": f"{split} one"}, {"text": "two", "sentence": "two"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for corpus in (*NAMED, "owner/name", "owner/name:part"):
        calibration = tokens_of(corpus, "calibration", tokenizer).tolist()
        evaluation = tokens_of(corpus, "evaluation", tokenizer).tolist()
        assert calibration != evaluation
        train = ["train one\n\ntwo"] if corpus in ("wikitext2", "ptb") else ["train one", "two"]
        assert calibration == token_ids(tokenizer, train)
    assert calls == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", True, None),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", True, None),
        ("allenai/c4", "en", "train", True, None),
        ("allenai/c4", "en", "validation", True, None),
        ("ptb-text-only/ptb_text_only", None, "train", True, "refs/convert/parquet"),
        ("ptb-text-only/ptb_text_only", None, "test", True, "refs/convert/parquet"),
        ("owner/name", None, "train", True, None),
        ("owner/name", None, "test", True, None),
        ("owner/name", "part", "train", True, None),
        ("owner/name", "part", "test", True, None),
    ]


def test_a_hub_data_set_without_the_text_column_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"body": "one"}])
    with refused("owner/name", "'text'"):
        tokens_of("owner/name", "calibration", tokenizer)


def test_a_corpus_is_read_no_further_than_needed(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0

    def endless(*_: object, **__: object) -> Iterator[dict[str, str]]:
        nonlocal read
        while True:
            read += 1
            yield {"text": "The old king slept."}

    monkeypatch.setattr("datasets.load_dataset", endless)
    counting = CountingTokenizer(tokenizer)
    assert len(tokens_of("c4", "calibration", counting, at_least=1000)) >= 1000
    assert counting.texts <= read <= 400


# --- the demo corpus


def test_the_demo_corpus_has_different_text_for_calibration_and_evaluation(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorter = {purpose: (seed, 20_000) for purpose, (seed, _) in corpora.DEMO_TEXT.items()}
    monkeypatch.setattr(corpora, "DEMO_TEXT", shorter)
    calibration = tokens_of("demo", "calibration", tokenizer)
    evaluation = tokens_of("demo", "evaluation", tokenizer)
    assert len(calibration) > 2_000
    assert tokens_of("demo", "calibration", tokenizer).tolist() == calibration.tolist()
    seen = {tuple(row.tolist()) for row in calibration.unfold(0, 64, 1)}
    assert not any(tuple(row.tolist()) in seen for row in evaluation.unfold(0, 64, 1))
