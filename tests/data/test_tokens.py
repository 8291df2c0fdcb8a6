"""The token cache: texts are tokenized once, and damaged files are written again."""

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.messages import refused, says
from helpers.texts import TEXTS, CountingTokenizer, token_ids
from safetensors.torch import save
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import pgprune_cli.demo
from pgprune_cli.data.tokens import check_vocabulary, tokens_of
from pgprune_cli.storage.paths import cache_directory


def test_a_text_is_tokenized_once_even_if_its_file_is_renamed(tokenizer: Any) -> None:
    Path("a.txt").write_text(TEXTS[0])
    counting = CountingTokenizer(tokenizer)
    first = tokens_of("a.txt", "calibration", counting)
    assert counting.texts == 1
    assert torch.equal(tokens_of("a.txt", "calibration", counting), first)
    Path("a.txt").rename("b.txt")
    assert torch.equal(tokens_of("b.txt", "calibration", counting), first)
    assert counting.texts == 1
    assert len(list(cache_directory().rglob("*"))) == 2  # the folder and one file, nothing temporary


def test_a_changed_file_is_tokenized_again(tokenizer: Any) -> None:
    Path("a.txt").write_text(TEXTS[0])
    tokens_of("a.txt", "calibration", tokenizer)
    Path("a.txt").write_text(TEXTS[1])
    assert tokens_of("a.txt", "calibration", tokenizer).tolist() == token_ids(tokenizer, TEXTS[1:2])


def test_the_suffix_of_a_file_is_part_of_the_cache_key(tokenizer: Any) -> None:
    line = json.dumps({"text": TEXTS[0]})
    Path("a.txt").write_text(line)
    Path("a.jsonl").write_text(line)
    assert tokens_of("a.txt", "calibration", tokenizer).tolist() == token_ids(tokenizer, [line])
    assert tokens_of("a.jsonl", "calibration", tokenizer).tolist() == token_ids(tokenizer, TEXTS[:1])


def test_the_tokenizer_and_the_length_are_part_of_the_cache_key(tokenizer: Any) -> None:
    from tokenizers import normalizers

    Path("a.txt").write_text(TEXTS[0])
    before = tokens_of("a.txt", "calibration", tokenizer)
    lowercase = AutoTokenizer.from_pretrained(Path(pgprune_cli.demo.__file__).parent / "model")
    lowercase.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert tokens_of("a.txt", "calibration", lowercase).tolist() != before.tolist()
    counting = CountingTokenizer(tokenizer)
    tokens_of("a.txt", "calibration", counting, at_least=3)
    assert counting.texts == 1


def test_whether_special_tokens_are_split_is_part_of_the_cache_key(tokenizer: Any) -> None:
    """`split_special_tokens` of tokenizer_config.json is not in what the backend writes about itself."""
    Path("a.txt").write_text(f"Mira owned {tokenizer.eos_token} one red kite.")
    splitting = AutoTokenizer.from_pretrained(
        Path(pgprune_cli.demo.__file__).parent / "model", split_special_tokens=True
    )
    before = tokens_of("a.txt", "calibration", tokenizer)
    assert tokens_of("a.txt", "calibration", splitting).tolist() != before.tolist()


def test_the_merges_of_a_tokenizer_without_a_backend_are_part_of_the_cache_key() -> None:
    class WithoutBackend(CountingTokenizer):
        backend_tokenizer = None

    Path("a.txt").write_text("the")
    vocabulary = {token: number for number, token in enumerate(["<unk>", "t", "h", "e", "th", "he", "the"])}
    tokens = []
    for merges in ([("t", "h")], [("h", "e")]):
        model = BPE(vocabulary, merges, unk_token="<unk>")
        tokenizer = WithoutBackend(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)))
        tokens.append(tokens_of("a.txt", "calibration", tokenizer).tolist())
    assert tokens == [[4, 3], [1, 5]]


def test_a_long_text_takes_the_memory_of_its_tensors(tokenizer: Any) -> None:
    class Long(CountingTokenizer):
        def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [list(range(1000, 2000)) for _ in texts]}

    Path("a.jsonl").write_text(json.dumps({"text": TEXTS[0]}) + "\n")
    Path("b.jsonl").write_text((json.dumps({"text": TEXTS[0]}) + "\n") * 640)
    peaks = []
    for name in ("a.jsonl", "b.jsonl"):
        tracemalloc.start()
        try:
            tokens = tokens_of(name, "calibration", Long(tokenizer))
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert len(tokens) == 640_000
    assert peaks[1] - peaks[0] < 12 * len(tokens)  # a list of integers takes 36 bytes for each


def test_a_damaged_cache_file_is_written_again(tokenizer: Any) -> None:
    """A truncated or empty file, a flipped bit, a wrong checksum, and a file without tokens."""
    Path("a.txt").write_text(TEXTS[0])
    tokens = tokens_of("a.txt", "calibration", tokenizer)
    (cached,) = cache_directory().rglob("*.safetensors")
    intact = cached.read_bytes()
    flipped = bytearray(intact)
    flipped[-3] ^= 1
    wrong_checksum = save({"tokens": torch.zeros(3)}, {"sha256": "0" * 64})
    for content in (intact[:20], b"", flipped, wrong_checksum, save({"words": torch.zeros(3)})):
        cached.write_bytes(content)
        assert torch.equal(tokens_of("a.txt", "calibration", tokenizer), tokens)
        assert cached.read_bytes() == intact


def test_a_cache_that_cannot_be_written_is_only_a_warning(tokenizer: Any, capsys) -> None:
    Path("a.txt").write_text(TEXTS[0])
    cache_directory().parent.mkdir(exist_ok=True)
    cache_directory().write_text("in the way")
    assert len(tokens_of("a.txt", "calibration", tokenizer))
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    says(re.sub("[0-9a-f]{32}", "<key>", err), "pgprune: ", str(cache_directory()))


def test_the_cache_directory_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty variable counts as none, and the home directory is only asked for where it is used."""

    def homeless() -> Path:
        raise RuntimeError("no home directory")

    assert cache_directory() == tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "home", homeless)
        for set_or_not in (lambda: patch.setenv("PGPRUNE_CACHE", ""), lambda: patch.delenv("PGPRUNE_CACHE")):
            set_or_not()
            assert cache_directory() == tmp_path / "xdg" / "pgprune"
    monkeypatch.setenv("PGPRUNE_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    for set_or_not in (lambda: monkeypatch.setenv("XDG_CACHE_HOME", ""), lambda: monkeypatch.delenv("XDG_CACHE_HOME")):
        set_or_not()
        assert cache_directory() == tmp_path / ".cache" / "pgprune"


def test_check_vocabulary_refuses_a_token_without_an_embedding() -> None:
    check_vocabulary(torch.tensor([0, 95]), "x.txt", 96)
    check_vocabulary(torch.tensor([], dtype=torch.int64), "x.txt", 96)
    with refused("x.txt", "96 embeddings"):
        check_vocabulary(torch.tensor([96, 0]), "x.txt", 96)
    check_vocabulary(torch.tensor([0]), "x.txt", 96, bos=95)
    with refused("x.txt", "up to 96"):
        check_vocabulary(torch.tensor([0]), "x.txt", 96, bos=96)


def test_a_tokenizer_that_fails_on_a_text_is_refused() -> None:
    Path("a.txt").write_text("the dog")
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"the": 0}, unk_token="<unk>")))
    with refused("tokenizer does not work", "UNK"):
        tokens_of("a.txt", "calibration", words)
