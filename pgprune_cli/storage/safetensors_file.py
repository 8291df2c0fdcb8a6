"""Writes safetensors files one tensor at a time, so that no more than one is in memory because of the file.

The library's own writer takes all tensors of a file at once. A file consists of the length of its JSON header as 8
bytes, the header, and the bytes of the tensors without gaps (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes that weights may have, by their names in a safetensors header."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(Protocol):
    """What the header says about a tensor."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> torch.Size: ...
    @property
    def dtype(self) -> torch.dtype: ...


class _Named(NamedTuple):
    name: str
    shape: torch.Size
    dtype: torch.dtype


def bytes_of(entry: Entry) -> int:
    """Return the size of a tensor in its file."""
    return entry.shape.numel() * entry.dtype.itemsize


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
