"""Weight files that pgprune writes, compared with the safetensors library."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
import torch
from helpers.messages import refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pgprune_cli.storage import safetensors_file as weights


class Entry(NamedTuple):
    name: str
    shape: torch.Size
    dtype: torch.dtype


def some_tensors() -> dict[str, torch.Tensor]:
    tensors = {f"a.{name}": torch.randn(3, 5).to(dtype) for name, dtype in weights.DTYPES.items()}
    tensors |= {"column": torch.randn(4, 6).t()[:, :1], "transposed": torch.randn(4, 6).t(), "one": torch.randn(1)}
    return tensors | {"ünï": torch.randn(2, 2, 2)}


def test_the_library_reads_a_written_file(tmp_path):
    tensors = some_tensors() | {name: torch.eye(3).to(dtype) for dtype, name in weights.NAMES.items()}
    entries = [Entry(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
    weights.write(tmp_path / "x.safetensors", entries, iter(tensors.values()))
    stored = load_file(tmp_path / "x.safetensors")
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert stored[name].dtype == tensor.dtype and torch.equal(stored[name].double(), tensor.double())
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    size = len(weights.header(entries)) + sum(map(weights.bytes_of, entries))
    assert (tmp_path / "x.safetensors").stat().st_size == size


def test_a_file_of_one_dtype_equals_the_librarys_byte_for_byte(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5)}
    entries = [Entry(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
    weights.write(tmp_path / "ours", entries, tensors.values())
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_tensors_of_several_dtypes_are_in_the_librarys_order(tmp_path):
    tensors = some_tensors() | {"odd": torch.ones(3, dtype=torch.float16)}
    weights.write_tensors(tmp_path / "ours", tensors)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, tmp_path / "theirs", metadata={"format": "pt"})
    ours, theirs = (list(header_of(tmp_path / name)) for name in ("ours", "theirs"))
    assert ours == theirs
    stored = load_file(tmp_path / "ours")
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())


def header_of(path):
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def test_tensors_are_written_one_by_one(tmp_path):
    """When a tensor is requested, the previous one is in the file already."""
    entries = [Entry(str(n), torch.Size([1000]), torch.float32) for n in range(50)]

    def tensors():
        for n in range(50):
            # up to 64 KiB may be buffered
            assert (tmp_path / "x").stat().st_size >= len(weights.header(entries)) + n * 4000 - (1 << 16)
            yield torch.full((1000,), float(n))

    weights.write(tmp_path / "x", entries, tensors())
    assert (tmp_path / "x").stat().st_size == len(weights.header(entries)) + 50 * 4000


def test_a_tensor_of_another_shape_than_its_entry_fails(tmp_path):
    with pytest.raises(AssertionError, match="w"):
        weights.write(tmp_path / "x", [Entry("w", torch.Size([3]), torch.float32)], [torch.zeros(4)])


def test_a_git_lfs_pointer_is_refused_as_one(tmp_path):
    pointer = tmp_path / "model.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:6b8a0c\nsize 269060552\n")
    with refused(f"{pointer}: ", "git lfs pull"):
        weights.stored_tensors(pointer)
