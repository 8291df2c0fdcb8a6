"""Writes safetensors files one tensor at a time, so that only one tensor of the export is in memory.

The library's own writer takes all tensors of a file at once. A file consists of the length of its JSON header as 8
bytes, the header, and the bytes of the tensors without gaps (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

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
    """Write the new file `path`, whose tensors come in the order of their entries. The caller syncs it to disk.

    Raises OSError.
    """
    with path.open("xb") as file:
        file.write(header(entries))
        for entry, tensor in zip(entries, tensors, strict=True):
            assert (tensor.shape, tensor.dtype) == (entry.shape, entry.dtype), entry.name
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
