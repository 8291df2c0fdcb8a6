"""Files as people have them: gzipped, from Windows, with null rows, other columns and other spellings of the suffix."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from helpers.messages import refused
from helpers.texts import TEXTS, token_ids
from pyarrow import parquet

from pgprune_cli.data.corpora import check_corpus, documents, text_identity
from pgprune_cli.data.tokens import tokens_of
from pgprune_cli.data.windows import calibration_text

ROWS = [{"id": number, "text": text, "story": text.upper()} for number, text in enumerate(TEXTS)]
LINES = "".join(f"{json.dumps(row)}\n" for row in ROWS)
COLUMNS = {key: [row[key] for row in ROWS] for key in ROWS[0]}


def read(corpus: str) -> list[str]:
    return list(documents(corpus, "calibration"))


def write_gzip(name: str, text: str) -> None:
    Path(name).write_bytes(gzip.compress(text.encode()))


WRITERS: dict[str, Callable[[str], object]] = {
    "a.jsonl": lambda name: Path(name).write_text(LINES),
    "a.JSONL": lambda name: Path(name).write_text(LINES),
    "a.json": lambda name: Path(name).write_text(LINES),
    "array.json": lambda name: Path(name).write_text(json.dumps(ROWS, indent=2)),
    "a.jsonl.gz": lambda name: write_gzip(name, LINES),
    "c4-train.00000-of-01024.json.gz": lambda name: write_gzip(name, LINES),
    "array.json.gz": lambda name: write_gzip(name, json.dumps(ROWS)),
    "a.JSON.GZ": lambda name: write_gzip(name, LINES),
    "a.parquet": lambda name: parquet.write_table(pa.table(COLUMNS), name),
    "a.Parquet": lambda name: parquet.write_table(pa.table(COLUMNS), name),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_read_in_any_spelling_and_from_any_column(name: str) -> None:
    WRITERS[name](name)
    check_corpus(name)
    assert read(name) == TEXTS
    assert read(f"{name}:story") == [text.upper() for text in TEXTS]
    with refused(name, "'title'", "id, text, story", f"{name}:COLUMN"):
        read(f"{name}:title")
    with refused(name, "'id'", "not text", "id, text, story"):
        read(f"{name}:id")
    assert text_identity(name, "calibration") != text_identity(f"{name}:story", "calibration")


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.txt.gz"])
def test_a_text_file_is_read_in_any_spelling_and_has_no_columns(name: str) -> None:
    content = "\n".join(TEXTS).encode()
    Path(name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read(name) == ["\n".join(TEXTS)]
    with refused(name, ":story"):
        read(f"{name}:story")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "array.json", "a.txt.gz", "a.jsonl.gz"])
def test_a_byte_order_mark_is_no_text(name: str) -> None:
    """Notepad and PowerShell write one."""
    text = TEXTS[0] if ".txt" in name else json.dumps([{"text": TEXTS[0]}] if "array" in name else {"text": TEXTS[0]})
    content = b"\xef\xbb\xbf" + text.encode()
    Path(name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read(name) == [TEXTS[0]]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz"])
def test_windows_line_ends_are_read_as_others(name: str, tokenizer: Any) -> None:
    text = "\n".join(TEXTS) + "\n" if ".txt" in name else LINES
    tokens = []
    for content in (text.encode(), text.replace("\n", "\r\n").encode()):
        Path(name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        tokens.append(tokens_of(name, "calibration", tokenizer).tolist())
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "array.json", "a.parquet", "hub"])
def test_null_and_empty_rows_are_skipped(name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": text} for text in (None, TEXTS[0], "", TEXTS[1], None)]
    lines = "\n".join(map(json.dumps, rows))
    corpus = name
    if name == "hub":
        corpus = "owner/name"
        monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows)
    elif name == "a.parquet":
        parquet.write_table(pa.Table.from_pylist(rows), name)
    elif name.endswith(".gz"):
        write_gzip(name, lines)
    else:
        Path(name).write_text(json.dumps(rows) if "array" in name else lines)
    assert read(corpus) == TEXTS[:2]
    assert tokens_of(corpus, "calibration", tokenizer).tolist() == token_ids(tokenizer, TEXTS[:2])


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_every_kind_of_text_in_parquet_is_read(kind: str) -> None:
    types = {
        "string": pa.string(),
        "large_string": pa.large_string(),
        "string_view": pa.string_view(),
        "dictionary": pa.dictionary(pa.int32(), pa.string()),
    }
    table = pa.table({"text": pa.array([*TEXTS, None, TEXTS[0]], pa.string())})
    parquet.write_table(table.cast(pa.schema({"text": types[kind]})), "a.parquet")
    assert read("a.parquet") == [*TEXTS, TEXTS[0]]


def test_parquet_text_that_is_not_utf_8_is_refused() -> None:
    texts = pa.array([b"The old king", b"slept\xff"]).view(pa.string())
    parquet.write_table(pa.table({"id": [0, 1], "text": texts}), "a.parquet")
    with refused("a.parquet", "'text'", "UTF-8"):
        read("a.parquet")


def test_two_parquet_columns_of_the_same_name_are_refused() -> None:
    parquet.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), "a.parquet")
    with refused("a.parquet", "2 columns", "'text'"):
        read("a.parquet")


def test_a_parquet_column_of_nulls_holds_no_text(tokenizer: Any) -> None:
    parquet.write_table(pa.table({"text": pa.nulls(3)}), "a.parquet")
    with refused("a.parquet", "no text"):
        tokens_of("a.parquet", "calibration", tokenizer)


CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]


@pytest.mark.parametrize(
    ("value", "facts"),
    [(CHAT, ["a list", "chat template"]), ({"en": "Hello"}, ["an object"]), (7, ["a number", "id, text"])],
)
@pytest.mark.parametrize("place", ["a.jsonl:2", "owner/name"])
def test_rows_that_hold_no_text_are_refused(
    place: str, value: Any, facts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"id": 0, "text": "The old king slept."}, {"id": 1, "text": value}]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows)
    with refused(place, "'text'", *facts):
        read(place.partition(":")[0])


def test_the_columns_of_a_hub_data_set_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(*arguments: Any, **_: Any) -> list[dict[str, Any]]:
        calls.append(arguments)
        return [{"id": 1, "story": "The old king slept.", "messages": CHAT}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with refused("owner/name", "'text'", "id, story, messages", "owner/name::COLUMN"):
        read("owner/name")
    with refused("owner/name:part", "'text'", "owner/name:part:COLUMN"):
        read("owner/name:part")
    with refused("owner/name::messages", "'messages'", "a list"):
        read("owner/name::messages")
    assert read("owner/name::story") == read("owner/name:part:story") == ["The old king slept."]
    assert calls[-2:] == [("owner/name", None), ("owner/name", "part")]
    assert text_identity("owner/name::story", "calibration") != text_identity("owner/name", "calibration")


def test_null_lines_of_a_joined_data_set_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"text": text} for text in ("a", None, "", "b")])
    assert read("wikitext2") == ["a\n\n\n\nb"]


def test_a_file_whose_name_has_a_colon_is_a_file() -> None:
    Path("a.jsonl").write_text('{"b.jsonl": "column"}')
    assert read("a.jsonl:b.jsonl") == ["column"]
    Path("a.jsonl:b.jsonl").write_text('{"text": "file"}')
    assert read("a.jsonl:b.jsonl") == ["file"]


@pytest.mark.parametrize("corpus", ["missing.jsonl:story", "missing.json.gz", "missing.TXT", "./missing.parquet:story"])
def test_a_missing_file_is_no_data_set_on_the_hub(corpus: str) -> None:
    with refused(corpus, "no such file"):
        check_corpus(corpus)


@pytest.mark.parametrize("size", [30, 5])
def test_a_truncated_gzip_file_is_refused(size: int) -> None:
    Path("a.json.gz").write_bytes(gzip.compress(LINES.encode())[:size])
    with refused("a.json.gz", "not a whole gzip file"):
        read("a.json.gz")


def test_text_that_is_not_gzip_is_refused() -> None:
    Path("a.txt.gz").write_text("The old king slept.")
    with refused("a.txt.gz", "gzip"):
        read("a.txt.gz")


def test_an_array_that_is_not_json_is_refused() -> None:
    Path("a.json").write_text('[{"text": "one"},')
    with refused("a.json", "JSON array"):
        read("a.json")


def test_no_more_of_a_long_file_is_read_than_needed(tokenizer: Any) -> None:
    """The last line is damaged, and far behind what is needed."""
    Path("a.jsonl").write_text(json.dumps({"text": TEXTS[0]}).join(["", "\n"]) * 4000 + "{")
    assert len(calibration_text("a.jsonl", tokenizer, 4, 2, 8).search) == 4
