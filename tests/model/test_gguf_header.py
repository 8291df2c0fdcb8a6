"""GGUF headers are checked against the file before a library that trusts them reads it."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from helpers.messages import refused, says

from pgprune_cli.errors import UserError
from pgprune_cli.model import gguf_header
from pgprune_cli.model.gguf_config import rope_scaling
from pgprune_cli.model.gguf_header import MAX_ENTRIES, StoredTensor, read_header
from pgprune_cli.model.safety import check_gguf

pytest.importorskip("gguf", reason="no gguf: pip install 'pgprune[gguf]'")

F32, Q8_0 = 0, 8


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


LLAMA = entry("general.architecture", 8, text("llama"))
LAYERS = entry("llama.block_count", 4, struct.pack("<I", 7))
TOKENS = entry("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 2) + text("a") + text("b"))


def write(path: Path, entries: list[bytes], tensors: list[bytes], data: int, alignment: int = 32, head=None) -> Path:
    """Write a file with this header and `data` bytes of tensors."""
    head = head or b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries))
    content = head + b"".join([*entries, *tensors])
    path.write_bytes(content + bytes(-len(content) % alignment + data))
    return path


def fault_in(path: Path) -> str:
    """Return the error message for a file with a bad header."""
    with pytest.raises(UserError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: damaged or not GGUF: ") and "Fetch the model's files again." in message
    return message


def test_header_has_the_architecture_the_layers_and_the_weights(tmp_path: Path) -> None:
    tensors = [tensor("b", (64, 2), Q8_0, 32), tensor("a", (4,), F32, 0)]
    path = write(tmp_path / "x.gguf", [LLAMA, LAYERS, TOKENS], tensors, 32 + 4 * 34)
    header = read_header(path)
    assert (header.architecture, header.layers, header.weights) == ("llama", 7, 132)
    assert list(header.entries) == ["general.architecture", "llama.block_count", "tokenizer.ggml.tokens"]
    start = path.stat().st_size - 32 - 4 * 34
    assert header.tensors == {
        "a": StoredTensor(F32, (4,), start, start + 16),
        "b": StoredTensor(Q8_0, (64, 2), start + 32, start + 32 + 4 * 34),
    }
    alignment = entry("general.alignment", 4, struct.pack("<I", 64))
    tensors = [tensor("a", (4,), F32, 0)]
    assert read_header(write(tmp_path / "y.gguf", [LLAMA, LAYERS, alignment], tensors, 16, 64)).weights == 4


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    content = write(tmp_path / "x.gguf", [LLAMA, LAYERS, TOKENS], [tensor("a", (4,), F32, 0)], 16).read_bytes()
    for size in range(len(content)):
        (tmp_path / "x.gguf").write_bytes(content[:size])
        message = fault_in(tmp_path / "x.gguf")
        assert any(fact in message for fact in ("not begin with GGUF", "within its header", "its tensor 'a'")), message


@pytest.mark.parametrize(
    ("entries", "tensors", "facts"),
    [
        ([entry("x", 9, struct.pack("<IQ", 0, 2**60))], [], ("'x'", f"{2**60:,} entries", f"{MAX_ENTRIES:,}")),
        ([entry("x", 9, struct.pack("<IQ", 0, MAX_ENTRIES))], [], ("ends within its header",)),
        ([entry("x", 9, struct.pack("<IQIQ", 9, 1, 0, 0))], [], ("'x'", "type 9")),
        ([entry("x", 13, b"")], [], ("'x'", "type 13")),
        ([entry("x", 8, struct.pack("<Q", 2**63))], [], ("ends within its header",)),
        ([entry("general.alignment", 4, struct.pack("<I", 0))], [], ("aligned to 0 bytes",)),
        ([entry("llama.block_count", 10, struct.pack("<Q", 2**40))], [], ("llama.block_count",)),
        ([struct.pack("<Q", 1) + b"\xff" + struct.pack("<I", 0) + b"\0"], [], ("UTF-8",)),
        ([], [tensor("t", (2**40, 2**40), F32, 0)], ("ends", "tensor 't'")),
        ([], [tensor("t", (4,), F32, 2**62)], ("ends", "tensor 't'")),
        ([], [tensor("t", (), F32, 0)], ("tensor 't'", "0 axes")),
        ([], [tensor("t", (1,) * 5, F32, 0)], ("tensor 't'", "5 axes")),
        ([], [tensor("t", (0, 3), F32, 0)], ("tensor 't'", "(3, 0)")),
        ([], [tensor("t", (33,), Q8_0, 0)], ("tensor 't'", "(33,)")),
        ([], [tensor("t", (4,), 99, 0)], ("tensor 't'", "type 99")),
        ([], [tensor("t", (4,), F32, 0), tensor("u", (4,), F32, 8)], ("tensor 'u'", "overlaps")),
    ],
    ids=[
        *("long-list", "list-beyond-the-file", "list-of-lists", "unknown-type", "text-beyond-the-file"),
        *("alignment", "block-count", "not-utf-8", "huge-tensor", "offset-beyond-the-file", "no-axes", "five-axes"),
        *("no-weights", "partial-block", "unknown-tensor-type", "overlap"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(
    entries: list[bytes], tensors: list[bytes], facts: tuple[str, ...], tmp_path: Path
) -> None:
    says(fault_in(write(tmp_path / "x.gguf", [LLAMA, *entries], tensors, 99)), *facts)


@pytest.mark.parametrize("counts", [(2**63, 0), (0, 2**63), (2**64 - 1, 2**64 - 1), (10**6, 0)])
def test_counts_beyond_the_file_are_refused_before_any_entry_is_read(
    counts: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("read an entry")

    monkeypatch.setattr(gguf_header._HeaderReader, "_read_entry", read)
    monkeypatch.setattr(gguf_header._HeaderReader, "_check_tensors", read)
    path = write(tmp_path / "x.gguf", [], [], 10**4, head=b"GGUF" + struct.pack("<IQQ", 3, *counts))
    assert "ends within its header" in fault_in(path)


@pytest.mark.parametrize("version", [0, 1, 4, 3 << 24])
def test_an_unsupported_version_is_refused(version: int, tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", [], [], 0, head=b"GGUF" + struct.pack("<IQQ", version, 0, 0))
    says(fault_in(path), f"version {version}", "2 and 3")


@pytest.mark.parametrize(
    ("kind", "factor", "expected"),
    [
        (None, None, {}),
        (None, 4.0, {"rope_type": "linear", "factor": 4.0}),
        ("linear", 4.0, {"rope_type": "linear", "factor": 4.0}),
        ("linear", 0.0, {}),
        ("none", 4.0, {}),
    ],
)
def test_the_scaling_of_rope_is_that_of_llama_cpp(kind, factor, expected, tmp_path: Path) -> None:
    entries = [] if kind is None else [entry("llama.rope.scaling.type", 8, text(kind))]
    entries += [] if factor is None else [entry("llama.rope.scaling.factor", 6, struct.pack("<f", factor))]
    path = write(tmp_path / "x.gguf", [LLAMA, *entries], [tensor("a", (4,), F32, 0)], 16)
    assert rope_scaling("x", path, read_header(path)) == expected


@pytest.mark.parametrize(
    ("entries", "facts"),
    [
        ([entry("llama.rope.scaling.type", 8, text("yarn"))], ("llama.rope.scaling.type = yarn",)),
        ([entry("llama.rope.scaling.factor", 6, struct.pack("<f", float("nan")))], ("factor nan",)),
    ],
    ids=["yarn", "nan"],
)
def test_a_scaling_of_rope_that_cannot_be_translated_is_refused(
    entries: list[bytes], facts: tuple[str, ...], tmp_path: Path
) -> None:
    path = write(tmp_path / "x.gguf", [LLAMA, LAYERS, *entries], [tensor("a", (4,), F32, 0)], 16)
    with refused(*facts, "safetensors"):
        check_gguf("x", path)


@pytest.mark.parametrize(
    ("architecture", "layers", "experts", "facts"),
    [
        ("deci", 4, 0, ("different sizes", "--format hf")),
        ("gpt2", 4, 0, ("'gpt2' is not supported", "llama, mistral, qwen2, qwen3")),
        ("granite", 4, 0, ("cannot read the architecture granite", "safetensors")),
        ("llama", 4, 8, ("mixture of experts", "safetensors")),
        ("llama", 10**9, 0, ("1,000,000,000 layers", "1000")),
    ],
)
def test_a_gguf_file_that_cannot_be_pruned_is_refused(
    architecture: str, layers: int, experts: int, facts: tuple[str, ...], tmp_path: Path
) -> None:
    entries = [
        entry("general.architecture", 8, text(architecture)),
        entry(f"{architecture}.block_count", 4, struct.pack("<I", layers)),
        entry(f"{architecture}.expert_count", 4, struct.pack("<I", experts)),
    ]
    path = write(tmp_path / "x.gguf", entries, [tensor("a", (4,), F32, 0)], 16)
    with refused(*facts):
        check_gguf("x", path)


def test_a_bias_that_transformers_would_drop_is_refused(tmp_path: Path) -> None:
    """Of a Llama with biases, or one whose biases a repair fitted. Those of a Qwen2's q, k and v are read."""
    for architecture, bias in (("qwen2", "blk.0.attn_q.bias"), ("llama", "blk.0.ffn_down.bias")):
        entries = [entry("general.architecture", 8, text(architecture))]
        path = write(tmp_path / f"{architecture}.gguf", entries, [tensor(bias, (4,), F32, 0)], 16)
        if architecture == "qwen2":
            check_gguf("x", path)
            continue
        with refused(bias, "safetensors"):
            check_gguf("x", path)
