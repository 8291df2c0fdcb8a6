"""Corpora: what is read, what is refused in which words, what is cached, and that no window is seen twice."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.torch import save
from transformers import AutoTokenizer

import pgprune_cli.demo
from pgprune_cli.data import corpora as data
from pgprune_cli.data.corpora import NAMED
from pgprune_cli.data.tokens import cache_directory, check_vocabulary, tokens_of
from pgprune_cli.data.windows import Batches, calibration_text, cut_windows
from pgprune_cli.errors import UserError

TEXTS = ["Mira owned one red kite.", "The old king slept.", "It was Monday and the geese were loud."]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests write and name files relative to an empty folder, cache in another, and never reach the hub."""

    def unreachable(*_: object, **__: object) -> None:
        raise AssertionError("a test tried to reach the hub")

    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PGPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.load_dataset", unreachable)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(Path(pgprune_cli.demo.__file__).parent / "model")


class Counting:
    """A tokenizer that counts the texts it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.texts = tokenizer, 0

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.texts += len(texts)
        return self.tokenizer(texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def ids(tokenizer: Any, texts: list[str]) -> list[int]:
    return [token for text in texts for token in tokenizer(text)["input_ids"]]


def refusal(corpus: str, tokenizer: Any, purpose: data.Purpose = "calibration") -> str:
    with pytest.raises(UserError) as caught:
        tokens_of(corpus, purpose, tokenizer)
    return str(caught.value)


# --- local files


def test_a_text_file_is_one_document(tokenizer: Any) -> None:
    Path("a.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    tokens = tokens_of("a.txt", "calibration", tokenizer)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == ids(tokenizer, ["\n".join(TEXTS)])


def test_a_line_of_jsonl_is_a_document(tokenizer: Any) -> None:
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(TEXTS)]
    Path("a.jsonl").write_text("\n".join([*lines[:2], "", lines[2], ""]))
    assert tokens_of("a.jsonl", "calibration", tokenizer).tolist() == ids(tokenizer, TEXTS)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_only_a_newline_ends_a_line_of_jsonl(separator: str, tokenizer: Any) -> None:
    """Web text is full of U+2028 and U+0085, which JSON allows bare and `str.splitlines` breaks at."""
    text = f"one{separator}two"
    line = json.dumps({"text": text}, ensure_ascii=False)
    Path("a.jsonl").write_text(f"{line}\r\n{line}\n", encoding="utf-8", newline="")
    assert tokens_of("a.jsonl", "calibration", tokenizer).tolist() == ids(tokenizer, [text, text])


def test_a_row_of_parquet_is_a_document(tokenizer: Any) -> None:
    parquet.write_table(pa.table({"n": [1, 2, 3, 4, 5], "text": [*TEXTS[:2], None, "", TEXTS[2]]}), "a.parquet")
    assert tokens_of("a.parquet", "calibration", tokenizer).tolist() == ids(tokenizer, TEXTS)


def test_a_parquet_file_without_a_text_column(tokenizer: Any) -> None:
    parquet.write_table(pa.table({"body": ["a"], "n": [1]}), "a.parquet")
    assert refusal("a.parquet", tokenizer) == "a.parquet: no column 'text' among body, n"


def test_a_parquet_file_whose_text_is_numbers(tokenizer: Any) -> None:
    parquet.write_table(pa.table({"text": [1, 2]}), "a.parquet")
    assert refusal("a.parquet", tokenizer) == "a.parquet: column 'text' holds int64, not text"


def test_a_damaged_parquet_file(tokenizer: Any) -> None:
    Path("a.parquet").write_bytes(b"PAR1 and then nothing")
    assert refusal("a.parquet", tokenizer).startswith("a.parquet: not a readable parquet file (")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", "a.jsonl:3: not JSON (Expecting property name"),
        ('{"txt": "a"}', "a.jsonl:3: expected an object with a text in 'text'"),
        ('{"text": 7}', "a.jsonl:3: expected an object with a text in 'text'"),
        ('["text"]', "a.jsonl:3: expected an object with a text in 'text'"),
    ],
)
def test_a_bad_row_of_jsonl_is_named_by_its_line(line: str, message: str, tokenizer: Any) -> None:
    Path("a.jsonl").write_text(f'{{"text": "good"}}\n\n{line}\n{{"text": "good"}}\n')
    assert refusal("a.jsonl", tokenizer).startswith(message)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_that_is_not_utf8(name: str, tokenizer: Any) -> None:
    Path(name).write_bytes(b'{"text": "na' + b"\xefve")
    assert refusal(name, tokenizer) == f"{name}: not UTF-8 text (byte 12)"


def test_an_empty_file(tokenizer: Any) -> None:
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), "a.parquet")
    for name in ("a.txt", "a.jsonl"):
        Path(name).write_text("")
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        assert refusal(name, tokenizer) == f"{name}: holds no text"
        assert refusal(name, tokenizer) == f"{name}: holds no text"


def test_a_directory_and_a_file_of_another_kind(tokenizer: Any) -> None:
    Path("texts").mkdir()
    Path("texts.csv").write_text("text\na\n")
    for name in ("texts", "texts.csv", "./texts"):
        assert refusal(name, tokenizer) == f"{name}: expected a .txt, .jsonl, .parquet file"


@pytest.mark.parametrize(
    "name", ["openwebtext", "missing.txt", "./missing/file.jsonl", "texts/missing.parquet", "a/b/c"]
)
def test_a_name_that_is_nothing_is_met_with_what_there_is(name: str, tokenizer: Any) -> None:
    assert refusal(name, tokenizer) == (
        f"{name}: no such file, and not a corpus; known are wikitext2, c4, ptb, demo, a hub data set as owner/name or "
        "owner/name:config, and .txt, .jsonl, .parquet files"
    )


@pytest.mark.parametrize("name", ["demo", "wikitext2"])
def test_a_folder_of_the_same_name_does_not_hide_a_named_corpus(
    name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run directory may well be called `demo`."""
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"text": "from the hub"}])
    Path(name).mkdir()
    assert len(tokens_of(name, "calibration", tokenizer, wanted=4)) >= 4


# --- the hub


def test_an_offline_machine_is_told_which_file_to_give(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach\n  the hub")

    monkeypatch.setattr("datasets.load_dataset", offline)
    for purpose, split, where in (
        ("calibration", "train", "calibration.corpus: FILE"),
        ("evaluation", "validation", "--ppl c4=FILE, or in the recipe evaluation.corpora: [c4=FILE]"),
    ):
        assert refusal("c4", tokenizer, purpose) == (
            "c4: cannot be had from the hub (Couldn't reach the hub); on an offline machine give a local "
            f".txt, .jsonl, .parquet file with the {split} text instead ({where})"
        )


def test_a_connection_that_breaks_midway_is_an_error_too(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaking(*_: object, **__: object) -> Iterator[dict[str, str]]:
        yield {"text": "one"}
        raise ConnectionError("reset")

    monkeypatch.setattr("datasets.load_dataset", breaking)
    assert refusal("c4", tokenizer).startswith("c4: cannot be had from the hub (reset)")
    assert not list(cache_directory().rglob("*.safetensors"))


def test_calibration_and_evaluation_read_different_splits(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, config: str | None, *, split: str, streaming: bool, revision: str | None) -> list[dict]:
        asked.append((path, config, split, streaming, revision))
        return [{"text": f"{split} one", "sentence": f"{split} one"}, {"text": "two", "sentence": "two"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for corpus in (*NAMED, "owner/name", "owner/name:part"):
        calibration = tokens_of(corpus, "calibration", tokenizer).tolist()
        evaluation = tokens_of(corpus, "evaluation", tokenizer).tolist()
        assert calibration != evaluation
        train = ["train one\n\ntwo"] if corpus in ("wikitext2", "ptb") else ["train one", "two"]
        assert calibration == ids(tokenizer, train)
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", True, None),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", True, None),
        ("allenai/c4", "en", "train", True, None),
        ("allenai/c4", "en", "validation", True, None),
        ("ptb-text-only/ptb_text_only", "penn_treebank", "train", True, "refs/convert/parquet"),
        ("ptb-text-only/ptb_text_only", "penn_treebank", "test", True, "refs/convert/parquet"),
        ("owner/name", None, "train", True, None),
        ("owner/name", None, "test", True, None),
        ("owner/name", "part", "train", True, None),
        ("owner/name", "part", "test", True, None),
    ]


def test_a_hub_data_set_without_its_column(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"body": "one"}])
    assert refusal("owner/name", tokenizer) == "owner/name: its rows have no column 'text'"


def test_a_huge_corpus_is_read_no_further_than_wanted(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0

    def endless(*_: object, **__: object) -> Iterator[dict[str, str]]:
        nonlocal read
        while True:
            read += 1
            yield {"text": "The old king slept."}

    monkeypatch.setattr("datasets.load_dataset", endless)
    counting = Counting(tokenizer)
    assert len(tokens_of("c4", "calibration", counting, wanted=1000)) >= 1000
    assert counting.texts <= read <= 400


# --- the demo corpus


def test_the_demo_corpus_calibrates_and_evaluates_on_different_text(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorter = {purpose: (seed, 20_000) for purpose, (seed, _) in data.DEMO_TEXT.items()}
    monkeypatch.setattr(data, "DEMO_TEXT", shorter)
    calibration = tokens_of("demo", "calibration", tokenizer)
    evaluation = tokens_of("demo", "evaluation", tokenizer)
    assert len(calibration) > 2_000
    assert tokens_of("demo", "calibration", tokenizer).tolist() == calibration.tolist()
    seen = {tuple(row.tolist()) for row in calibration.unfold(0, 64, 1)}
    assert not any(tuple(row.tolist()) in seen for row in evaluation.unfold(0, 64, 1))


# --- the cache


def test_text_is_tokenised_once(tokenizer: Any) -> None:
    Path("a.txt").write_text(TEXTS[0])
    counting = Counting(tokenizer)
    first = tokens_of("a.txt", "calibration", counting)
    assert counting.texts == 1
    assert torch.equal(tokens_of("a.txt", "calibration", counting), first)
    Path("a.txt").rename("b.txt")
    assert torch.equal(tokens_of("b.txt", "calibration", counting), first)
    assert counting.texts == 1
    assert len(list(cache_directory().rglob("*"))) == 2  # the folder and one file, nothing temporary


def test_other_text_in_the_same_file_is_tokenised_anew(tokenizer: Any) -> None:
    Path("a.txt").write_text(TEXTS[0])
    tokens_of("a.txt", "calibration", tokenizer)
    Path("a.txt").write_text(TEXTS[1])
    assert tokens_of("a.txt", "calibration", tokenizer).tolist() == ids(tokenizer, TEXTS[1:2])


def test_the_same_bytes_under_another_suffix_are_other_text(tokenizer: Any) -> None:
    line = json.dumps({"text": TEXTS[0]})
    Path("a.txt").write_text(line)
    Path("a.jsonl").write_text(line)
    assert tokens_of("a.txt", "calibration", tokenizer).tolist() == ids(tokenizer, [line])
    assert tokens_of("a.jsonl", "calibration", tokenizer).tolist() == ids(tokenizer, TEXTS[:1])


def test_another_tokenizer_or_another_length_misses_the_cache(tokenizer: Any) -> None:
    from tokenizers import normalizers

    Path("a.txt").write_text(TEXTS[0])
    before = tokens_of("a.txt", "calibration", tokenizer)
    other = AutoTokenizer.from_pretrained(Path(pgprune_cli.demo.__file__).parent / "model")
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert tokens_of("a.txt", "calibration", other).tolist() != before.tolist()
    counting = Counting(tokenizer)
    tokens_of("a.txt", "calibration", counting, wanted=3)
    assert counting.texts == 1


def test_a_damaged_cache_is_made_again(tokenizer: Any) -> None:
    """Cut, with other tokens in it, of another kind: what can be made again is no reason to stop."""
    Path("a.txt").write_text(TEXTS[0])
    tokens = tokens_of("a.txt", "calibration", tokenizer)
    (cached,) = cache_directory().rglob("*.safetensors")
    whole = cached.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    other = save({"tokens": torch.zeros(3)}, {"sha256": "0" * 64})
    for content in (whole[:20], b"", flipped, other, save({"words": torch.zeros(3)})):
        cached.write_bytes(content)
        assert torch.equal(tokens_of("a.txt", "calibration", tokenizer), tokens)
        assert cached.read_bytes() == whole


def test_where_tokens_cannot_be_kept_a_run_goes_on(tokenizer: Any, capsys) -> None:
    Path("a.txt").write_text(TEXTS[0])
    cache_directory().parent.mkdir(exist_ok=True)
    cache_directory().write_text("in the way")
    assert len(tokens_of("a.txt", "calibration", tokenizer))
    err = capsys.readouterr().err
    assert err.startswith(f"pgprune: {cache_directory()}") and err.count("\n") == 1
    assert err.endswith("; the tokens of the text are not kept\n")


def test_the_cache_lies_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_directory() == tmp_path / "cache"
    monkeypatch.delenv("PGPRUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "pgprune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "pgprune"


# --- windows


@given(length=st.integers(0, 100), seqlen=st.integers(1, 20))
@settings(deadline=None)
def test_windows_are_the_stream_in_order_without_its_last_part(length: int, seqlen: int) -> None:
    rows = cut_windows(torch.arange(length), seqlen)
    assert rows.shape == (length // seqlen, seqlen)
    assert rows.flatten().tolist() == list(range(length // seqlen * seqlen))


def given_tokens(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """`calibration_text` gets the tokens 0, 1, 2, …, so that every window says where it comes from."""
    monkeypatch.setattr(data, "tokens_of", lambda *_, **__: torch.arange(count))


@pytest.mark.parametrize("length", [24, 31, 32, 100, 1001])
@pytest.mark.parametrize("windows", [1, 5, 1000])
def test_heldout_windows_are_never_searched_over(length: int, windows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given_tokens(monkeypatch, length)
    text = calibration_text("any", None, windows=windows, heldout=2, seqlen=8)
    searched, heldout = text.search.flatten().tolist(), text.heldout.flatten().tolist()
    assert text.heldout.shape == (2, 8)
    assert heldout == list(range(length - 16, length))
    assert len(text.search) == min(windows, (length - 16) // 8)
    assert len(set(searched)) == len(searched)
    assert max(searched) < length - 16
    for row in text.search.tolist():
        assert row == list(range(row[0], row[0] + 8))
    assert max(text.stream) < length - 16


def test_few_windows_are_spread_over_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    given_tokens(monkeypatch, 1016)
    text = calibration_text("any", None, windows=10, heldout=2, seqlen=8)
    starts = text.search[:, 0]
    assert starts.diff().max() - starts.diff().min() <= 8
    assert starts[0] < 104
    assert starts[-1] >= 1000 - 104


def test_long_windows_come_from_the_searched_part(monkeypatch: pytest.MonkeyPatch) -> None:
    given_tokens(monkeypatch, 1000)
    text = calibration_text("any", None, windows=3, heldout=2, seqlen=8)
    longer = text.long_windows(count=4, seqlen=100)
    assert longer.shape == (4, 100)
    assert int(longer.max()) < 984
    assert text.long_windows(count=4, seqlen=5000).tolist() == [list(range(984))]


def test_a_corpus_too_short_says_what_to_lower(tokenizer: Any) -> None:
    Path("a.txt").write_text(TEXTS[0])
    count = len(ids(tokenizer, TEXTS[:1]))
    with pytest.raises(UserError) as caught:
        calibration_text("a.txt", tokenizer, windows=4, heldout=3, seqlen=128)
    assert str(caught.value) == (
        f"a.txt: {count} tokens are too few for 3 held-out windows of 128 and one to search over; give more text, "
        "or lower calibration.heldout or calibration.seqlen"
    )


@pytest.mark.parametrize(("length", "enough"), [(23, False), (24, True)])
def test_one_window_to_search_over_is_enough(length: int, enough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given_tokens(monkeypatch, length)
    if enough:
        assert len(calibration_text("any", None, windows=9, heldout=2, seqlen=8).search) == 1
    else:
        with pytest.raises(UserError, match="23 tokens are too few"):
            calibration_text("any", None, windows=9, heldout=2, seqlen=8)


# --- batches


@given(rows=st.integers(1, 30), batch=st.integers(1, 12), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 5))
@settings(deadline=None)
def test_an_epoch_shows_every_window_at_most_once_and_whole_batches_only(
    rows: int, batch: int, seed: int, epoch: int
) -> None:
    batches = Batches(torch.arange(rows)[:, None] * torch.ones(1, 3, dtype=torch.int64), batch, seed)
    size = min(batch, rows)
    an_epoch = rows // size
    shown = [batches.at(position) for position in range(epoch * an_epoch, (epoch + 1) * an_epoch)]
    assert all(some.shape == (size, 3) for some in shown)
    numbers = torch.cat(shown)[:, 0].tolist()
    assert len(set(numbers)) == len(numbers) == an_epoch * size
    assert set(numbers) <= set(range(rows))
    if rows % size == 0:
        assert sorted(numbers) == list(range(rows))


def test_batches_are_reproducible_and_differ_per_epoch_and_seed() -> None:
    rows = torch.arange(64)[:, None]

    def epoch(number: int, seed: int) -> list[int]:
        batches = Batches(rows, 8, seed)
        return [int(x) for place in range(8) for x in batches.at(number * 8 + place)]

    assert epoch(0, seed=1) == epoch(0, seed=1)
    orders = [epoch(0, seed=1), epoch(1, seed=1), epoch(2, seed=1), epoch(0, seed=2), list(range(64))]
    assert len({tuple(order) for order in orders}) == 5


def test_a_position_names_its_batch_whatever_was_drawn_before() -> None:
    batches = Batches(torch.arange(40)[:, None], 8, seed=3)
    alone = batches.at(17)
    for position in (0, 99, 3):
        batches.at(position)
    assert torch.equal(batches.at(17), alone)
    torch.manual_seed(123)
    assert torch.equal(batches.at(17), alone)


def test_tokens_of_another_models_tokenizer_are_refused():
    check_vocabulary(torch.tensor([0, 95]), "x.txt", 96)
    check_vocabulary(torch.tensor([], dtype=torch.int64), "x.txt", 96)
    with pytest.raises(UserError, match=r"x\.txt: its tokens go up to number 96, and the model has 96 embeddings"):
        check_vocabulary(torch.tensor([96, 0]), "x.txt", 96)
