"""The header of a GGUF file is held against the file before a library that believes it gets to see it."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest

from pgprune_cli.errors import UserError
from pgprune_cli.model.gguf_header import MOST_ENTRIES, Header, read_header
from pgprune_cli.model.safety import check_gguf

pytest.importorskip("gguf", reason="no gguf: pip install 'pgprune[gguf]'")

F32, Q8_0 = 0, 8


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int, place: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, place)


ABOUT = entry("general.architecture", 8, text("llama"))
LAYERS = entry("llama.block_count", 4, struct.pack("<I", 7))
WORDS = entry("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 2) + text("a") + text("b"))


def put(path: Path, entries: list[bytes], tensors: list[bytes], data: int, alignment: int = 32, head=None) -> Path:
    head = head or b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries))
    content = head + b"".join([*entries, *tensors])
    path.write_bytes(content + bytes(-len(content) % alignment + data))
    return path


def said(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: damaged or not GGUF: ")
    return str(caught.value).removeprefix(f"{path}: damaged or not GGUF: ").partition("; fetch the model's")[0]


def test_what_a_header_says(tmp_path: Path) -> None:
    tensors = [tensor("b", (64, 2), Q8_0, 32), tensor("a", (4,), F32, 0)]
    whole = put(tmp_path / "x.gguf", [ABOUT, LAYERS, WORDS], tensors, 32 + 4 * 34)
    assert read_header(whole) == Header("llama", 7, 132)
    aligned = entry("general.alignment", 4, struct.pack("<I", 64))
    tensors = [tensor("a", (4,), F32, 0)]
    assert read_header(put(tmp_path / "y.gguf", [ABOUT, LAYERS, aligned], tensors, 16, 64)).weights == 4


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    whole = put(tmp_path / "x.gguf", [ABOUT, LAYERS, WORDS], [tensor("a", (4,), F32, 0)], 16).read_bytes()
    for size in range(len(whole)):
        (tmp_path / "x.gguf").write_bytes(whole[:size])
        assert said(tmp_path / "x.gguf") in (
            "it does not begin as one",
            "it ends within its header",
            "it ends before its tensor 'a' does",
        )


@pytest.mark.parametrize(
    ("entries", "tensors", "words"),
    [
        ([entry("x", 9, struct.pack("<IQ", 0, 2**60))], [], f"'x' is a list of {2**60:,} entries"),
        ([entry("x", 9, struct.pack("<IQ", 0, MOST_ENTRIES))], [], "it ends within its header"),
        ([entry("x", 9, struct.pack("<IQIQ", 9, 1, 0, 0))], [], "'x' is of the type 9, which is none that is read"),
        ([entry("x", 13, b"")], [], "'x' is of the type 13"),
        ([entry("x", 8, struct.pack("<Q", 2**63))], [], "it ends within its header"),
        ([entry("general.alignment", 4, struct.pack("<I", 0))], [], "its tensors are aligned to 0 bytes"),
        ([entry("llama.block_count", 10, struct.pack("<Q", 2**40))], [], "llama.block_count is no number of layers"),
        ([struct.pack("<Q", 1) + b"\xff" + struct.pack("<I", 0) + b"\0"], [], "a name in it is no UTF-8"),
        ([], [tensor("t", (2**40, 2**40), F32, 0)], "it ends before its tensor 't' does"),
        ([], [tensor("t", (4,), F32, 2**62)], "it ends before its tensor 't' does"),
        ([], [tensor("t", (), F32, 0)], "the tensor 't' has 0 axes"),
        ([], [tensor("t", (1,) * 5, F32, 0)], "the tensor 't' has 5 axes"),
        ([], [tensor("t", (0, 3), F32, 0)], "the tensor 't' has the shape (3, 0), which its type cannot have"),
        ([], [tensor("t", (33,), Q8_0, 0)], "the tensor 't' has the shape (33,), which its type cannot have"),
        ([], [tensor("t", (4,), 99, 0)], "the tensor 't' is of the type 99"),
        ([], [tensor("t", (4,), F32, 0), tensor("u", (4,), F32, 8)], "the tensor 'u' lies upon another"),
    ],
)
def test_what_does_not_fit(entries: list[bytes], tensors: list[bytes], words: str, tmp_path: Path) -> None:
    assert said(put(tmp_path / "x.gguf", [ABOUT, *entries], tensors, 99)).startswith(words)


@pytest.mark.parametrize("counts", [(2**63, 0), (0, 2**63), (2**64 - 1, 2**64 - 1), (10**6, 0)])
def test_counts_beyond_the_file_take_no_time(counts: tuple[int, int], tmp_path: Path) -> None:
    path = put(tmp_path / "x.gguf", [], [], 10**4, head=b"GGUF" + struct.pack("<IQQ", 3, *counts))
    began = time.monotonic()
    assert said(path) == "it ends within its header"
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("version", [0, 1, 4, 3 << 24])
def test_versions_that_are_not_read(version: int, tmp_path: Path) -> None:
    path = put(tmp_path / "x.gguf", [], [], 0, head=b"GGUF" + struct.pack("<IQQ", version, 0, 0))
    assert said(path) == f"version {version} is not read, only 2 and 3, little-endian"


@pytest.mark.parametrize(
    ("architecture", "layers", "words"),
    [
        ("deci", 4, "name the run, or its export as --format hf"),
        ("gpt2", 4, "model type 'gpt2' is not supported; pgprune prunes llama, mistral, qwen2, qwen3"),
        ("llama", 10**9, "1,000,000,000 layers: at most 1000 are read"),
    ],
)
def test_headers_of_what_is_not_read(architecture: str, layers: int, words: str, tmp_path: Path) -> None:
    about = entry("general.architecture", 8, text(architecture))
    count = entry(f"{architecture}.block_count", 4, struct.pack("<I", layers))
    path = put(tmp_path / "x.gguf", [about, count], [tensor("a", (4,), F32, 0)], 16)
    with pytest.raises(UserError) as caught:
        check_gguf("x", path)
    assert words in str(caught.value)
