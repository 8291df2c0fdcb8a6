"""Corpora: any bytes under every suffix, and files of the right format with odd contents."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pytest
from helpers.inputs import JSON_VALUES, accepted_or_refused, damaged, examples, write
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from pgprune_cli.data.text_files import FORMATS, GZIPPED
from pgprune_cli.data.tokens import tokens_of
from pgprune_cli.data.windows import calibration_text
from pgprune_cli.model.loading import load_tokenizer
from pgprune_cli.model.source import resolve


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve("demo"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpora")


def read(path: Path, tokenizer, kind: str) -> None:
    with accepted_or_refused(kind):
        tokens = tokens_of(str(path), "evaluation", tokenizer)
        assert tokens.dim() == 1 and len(tokens)
        with accepted_or_refused(f"{kind}, windows"):
            calibration_text(str(path), tokenizer, 4, 2, 8)


@pytest.mark.parametrize("suffix", [*FORMATS, *GZIPPED])
@examples(40)
@given(content=st.binary(max_size=300))
def test_any_bytes_are_accepted_or_refused(suffix: str, content: bytes, folder: Path, tokenizer) -> None:
    read(write(folder / f"x{suffix}", content), tokenizer, "corpora, bytes")


@examples(60)
@given(text=st.text(max_size=300), encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))
def test_text_in_any_encoding_is_accepted_or_refused(text: str, encoding: str, folder: Path, tokenizer) -> None:
    content = text.encode(encoding, errors="replace")
    for suffix in FORMATS:
        read(write(folder / f"x{suffix}", content), tokenizer, "corpora, encodings")


ROWS = st.one_of(
    JSON_VALUES,
    st.dictionaries(st.sampled_from(["text", "Text", "content"]), JSON_VALUES),
    st.fixed_dictionaries({"text": st.text()}),
)


@examples(80)
@given(rows=st.lists(ROWS, max_size=4))
def test_json_lines_of_any_rows_are_accepted_or_refused(rows: list, folder: Path, tokenizer) -> None:
    content = "\n".join(json.dumps(row) for row in rows).encode()
    read(write(folder / "x.jsonl", content), tokenizer, "corpora, rows")
    read(write(folder / "x.json", json.dumps(rows).encode()), tokenizer, "corpora, arrays")
    read(write(folder / "x.json.gz", gzip.compress(content)), tokenizer, "corpora, gzip")


TEXTS = st.lists(st.none() | st.text(min_size=1, max_size=40), min_size=2, max_size=2)
COLUMNS = st.one_of(
    TEXTS,
    st.lists(st.integers(0, 9), min_size=2, max_size=2),
    st.lists(st.binary(max_size=9), min_size=2, max_size=2),
    st.lists(st.lists(st.text(max_size=9)), min_size=2, max_size=2),
)

TABLES = st.dictionaries(st.sampled_from(["text", "Text", "x"]), COLUMNS, max_size=2)


@examples(60)
@given(columns=st.one_of(TABLES, st.fixed_dictionaries({"text": TEXTS})))
def test_parquet_with_any_columns_is_accepted_or_refused(columns: dict, folder: Path, tokenizer) -> None:
    parquet.write_table(pyarrow.table(columns), folder / "x.parquet")
    read(folder / "x.parquet", tokenizer, "corpora, columns")


@examples(80)
@given(data=st.data())
def test_damaged_parquet_is_accepted_or_refused(data, folder: Path, tokenizer) -> None:
    parquet.write_table(pyarrow.table({"text": ["a b c", "the end"] * 20}), folder / "intact.parquet")
    content = data.draw(damaged((folder / "intact.parquet").read_bytes()))
    read(write(folder / "x.parquet", content), tokenizer, "corpora, parquet")


@examples(40)
@given(data=st.data())
def test_a_damaged_token_cache_is_replaced_or_refused(data, folder: Path, tokenizer, token_cache: str) -> None:
    path = write(folder / "cached.txt", b"the end " * 99)
    tokens = tokens_of(str(path), "evaluation", tokenizer)
    before = {file: file.read_bytes() for file in Path(token_cache).rglob("*.safetensors")}
    file = max(before, key=lambda file: file.stat().st_mtime_ns)
    write(file, data.draw(damaged(before[file])))
    with accepted_or_refused("corpora, cache"):
        assert tokens_of(str(path), "evaluation", tokenizer).dim() == tokens.dim()
    write(file, before[file])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("one-token.txt", b"a"),
        ("empty.txt", b""),
        ("blank.txt", b" \n \n"),
        ("nul.txt", b"\0" * 10**5),
        ("huge-line.txt", b"the end of a line " * 10**5),
        ("huge-word.txt", b"x" * 10**6),
        ("huge-line.jsonl", json.dumps({"text": "the end " * 10**5}).encode()),
        ("deep.jsonl", b'{"text": ' + b"[" * 10**5),
        ("number.jsonl", b'{"text": ' + b"9" * 10**5),
        ("blank.jsonl", b"\n\n\n"),
        ("surrogate.jsonl", b'{"text": "\\ud800 alone"}'),
    ],
)
def test_an_odd_file_is_accepted_or_refused(name: str, content: bytes, folder: Path, tokenizer) -> None:
    read(write(folder / name, content), tokenizer, "corpora, odd")
