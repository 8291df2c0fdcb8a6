"""Reads the headers of safetensors files, and writes such files one tensor at a time.

So no more than one tensor is in memory because of the file.

The library's own writer takes all tensors of a file at once. A file consists of the length of its JSON header as 8
bytes, the header, and the bytes of the tensors without gaps (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pgprune_cli.errors import UserError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes that weights may have, by their names in a safetensors header."""

NAMES = {dtype: name for name, dtype in DTYPES.items()} | {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
"""The names in a header of all dtypes that can be written. Files that are converted hold positions and masks too."""


class Entry(Protocol):
    """What the header says about a tensor."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> torch.Size: ...
    @property
    def dtype(self) -> torch.dtype: ...


class StoredTensor(NamedTuple):
    """A tensor in a file: the name of its dtype, its shape, and where its bytes begin and end."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class _Named(NamedTuple):
    name: str
    shape: torch.Size
    dtype: torch.dtype


def bytes_of(entry: Entry) -> int:
    """Return the size of a tensor in its file."""
    return entry.shape.numel() * entry.dtype.itemsize


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name, without reading them. Raises UserError for a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):  # checks that the header fits the file
            pass
    except (SafetensorError, OSError) as error:
        if _is_lfs_pointer(path):
            raise UserError(f"{path}: a Git LFS pointer, not the weights. Fetch them: git lfs pull") from None
        raise UserError(f"{path}: damaged or not safetensors ({error}). Fetch the model's files again.") from None
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        content = json.loads(file.read(size))
    content.pop("__metadata__", None)
    return {
        name: StoredTensor(entry["dtype"], tuple(entry["shape"]), *(8 + size + end for end in entry["data_offsets"]))
        for name, entry in content.items()
    }


def _is_lfs_pointer(path: Path) -> bool:
    """Return whether Git, without Git LFS, has put a few lines in place of the file."""
    start = b"version https://git-lfs"
    with suppress(OSError), path.open("rb") as file:
        return file.read(len(start)) == start
    return False


def header(entries: Sequence[Entry]) -> bytes:
    """Return the beginning of the file, up to the bytes of its first tensor."""
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + bytes_of(entry)
        content[entry.name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def write(path: Path, entries: Sequence[Entry], tensors: Iterable[Tensor]) -> None:
    """Write the file `path`, whose tensors come in the order of their entries. The caller syncs it to disk.

    Raises OSError.
    """
    with path.open("wb") as file:
        file.write(header(entries))
        for entry, tensor in zip(entries, tensors, strict=True):
            assert (tensor.shape, tensor.dtype) == (entry.shape, entry.dtype), entry.name
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors, which may be on any device, to the file `path`, in the library's order. Raises OSError.

    The widest dtypes come first, so that every tensor begins at a multiple of its own width.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    entries = [_Named(name, tensors[name].shape, tensors[name].dtype) for name in names]
    write(path, entries, (tensors[name].cpu().contiguous() for name in names))
