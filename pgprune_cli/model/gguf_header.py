"""Reads the header of a GGUF file and checks it against the file: counts, lengths, types, shapes and positions.

The libraries that read GGUF trust the header. A list of 2^60 numbers would keep them busy and fill the memory, so a
header is checked here first. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from struct import Struct, error

from pgprune_cli.errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
"""Every tensor begins at a multiple of this number of bytes, unless the header has `general.alignment`."""
MAX_AXES = 4
MAX_ENTRIES = 1 << 22
"""Entries of one list. The libraries make an object of each; vocabularies have a sixteenth of this."""

TRUNCATED = "the file ends within its header"

ARCHITECTURE = "general.architecture"
PARTS = "split.count"
"""Into how many files the model is split, a 16-bit number. Absent or 0 if it is in one file."""
SCALING_TYPE = ".rope.scaling.type"
"""How the name of the entry about the scaling of RoPE ends, after the architecture."""
U16, U32, U64, FLOAT = Struct("<H"), Struct("<I"), Struct("<Q"), Struct("<f")
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a number, by the code of its type."""
UINT16, UINT32, FLOAT32, STRING, LIST = 2, 4, 6, 8, 9
F32 = 0
"""The code of the type of a tensor of 32-bit floats."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the file: the code of its type, its shape as GGUF has it, and where its bytes begin and end."""

    type: int
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a header says.

    architecture: llama.cpp's name of it; layers: how many the model has; weights: how many all tensors hold together;
    entries: by name, where in the file the type and value of a metadata entry begin and end; numbers: the values of the
    entries that are unsigned 32-bit numbers, and that of PARTS; floats: those of 32-bit floats; texts: those of
    ARCHITECTURE and the type of RoPE scaling; tensors: by name.
    """

    architecture: str
    layers: int
    weights: int
    entries: Mapping[str, tuple[int, int]]
    numbers: Mapping[str, int]
    floats: Mapping[str, float]
    texts: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]


def read_header(path: Path) -> Header:
    """Return what the header of a GGUF file says. Raises UserError if it does not fit the file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _HeaderReader(content).header()
    except ImportError:
        raise UserError(
            f"{path.name}: reading GGUF needs the gguf library. Install it with: pip install 'pgprune[gguf]'"
        ) from None
    except (_HeaderError, error, ValueError) as caught:  # ValueError for an empty file, which cannot be mapped
        reason = caught if isinstance(caught, _HeaderError) else TRUNCATED
        raise UserError(f"{path}: damaged or not GGUF: {reason}. Fetch the model's files again.") from None


class _HeaderError(Exception):
    """What is wrong with a header."""


class _HeaderReader:
    """Reads a header from its first byte to its last."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.position = content, 0
        self.numbers: dict[str, int] = {}
        self.floats: dict[str, float] = {}
        self.texts: dict[str, str] = {}
        self.entries: dict[str, tuple[int, int]] = {}

    def header(self) -> Header:
        if self.content[:4] != MAGIC:
            raise _HeaderError(f"the file does not begin with {MAGIC.decode()}")
        self.position = 4
        if (version := self._number(U32)) not in VERSIONS:
            supported = " and ".join(map(str, VERSIONS))
            raise _HeaderError(f"version {version} is not supported, only little-endian {supported}")
        tensors, entries = self._number(U64), self._number(U64)
        self._skip(24 * tensors + 13 * entries)  # the smallest size of each, to refuse counts beyond the file at once
        self.position = 24
        for _ in range(entries):
            self._read_entry()
        by_name, weights = self._check_tensors(tensors)
        architecture = self.texts.get(ARCHITECTURE, "")
        layers = self.numbers.get(f"{architecture}.block_count", 0)
        return Header(architecture, layers, weights, self.entries, self.numbers, self.floats, self.texts, by_name)

    def _read_entry(self) -> None:
        """Read a metadata entry, and keep its place."""
        name, start = self._text(), self.position
        self._read_value(name)
        self.entries[name] = (start, self.position)

    def _read_value(self, name: str) -> None:
        """Read the type and value of a metadata entry, and keep the values that are used later."""
        kind, begin = self._number(U32), self.position
        if kind != LIST:
            self._skip_values(name, kind, 1)
            if kind == STRING and (name == ARCHITECTURE or name.endswith(SCALING_TYPE)):
                self.texts[name] = self.content[begin + U64.size : self.position].decode(errors="replace")
            elif kind == UINT32:
                (self.numbers[name],) = U32.unpack_from(self.content, begin)
            elif kind == FLOAT32:
                (self.floats[name],) = FLOAT.unpack_from(self.content, begin)
            elif kind == UINT16 and name == PARTS:
                (self.numbers[name],) = U16.unpack_from(self.content, begin)
            elif name.endswith(".block_count"):
                raise _HeaderError(f"{name} is not a 32-bit number")
            return
        kind, count = self._number(U32), self._number(U64)
        if count > MAX_ENTRIES:
            raise _HeaderError(f"{name!r} is a list of {count:,} entries, but at most {MAX_ENTRIES:,} are supported")
        self._skip_values(name, kind, count)

    def _skip_values(self, name: str, kind: int, count: int) -> None:
        """Skip `count` values of one type."""
        if kind in SIZES:
            self._skip(count * SIZES[kind])
        elif kind == STRING:
            for _ in range(count):
                self._skip(self._number(U64))
        else:
            raise _HeaderError(f"{name!r} has the unknown type {kind}")

    def _check_tensors(self, count: int) -> tuple[dict[str, StoredTensor], int]:
        """Return the tensors by name, and how many weights they hold together.

        They are checked to fit the file and not to overlap.
        """
        from gguf import GGML_QUANT_SIZES

        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        tensors = [self._tensor(sizes) for _ in range(count)]
        alignment = self.numbers.get("general.alignment", ALIGNMENT)
        if alignment not in [1 << power for power in range(3, 21)]:
            raise _HeaderError(f"its tensors are aligned to {alignment} bytes, not to a power of two from 8 to 2^20")
        begin = end = -(-self.position // alignment) * alignment
        by_name = {}
        for offset, name, size, kind, shape in sorted(tensors):
            if begin + offset < end:
                raise _HeaderError(f"the tensor {name!r} overlaps another")
            end = begin + offset + size
            if end > len(self.content):
                raise _HeaderError(f"the file ends before the end of its tensor {name!r}")
            by_name[name] = StoredTensor(kind, shape, begin + offset, end)
        return by_name, sum(math.prod(shape) for *_, shape in tensors)

    def _tensor(self, sizes: dict[int, tuple[int, int]]) -> tuple[int, str, int, int, tuple[int, ...]]:
        """Return the offset of a tensor in the data, its name, its size in bytes, its type and its shape.

        sizes: by type, how many weights are stored together and in how many bytes.
        """
        name, axes = self._text(), self._number(U32)
        if not 1 <= axes <= MAX_AXES:
            raise _HeaderError(f"the tensor {name!r} has {axes} axes, not 1 to {MAX_AXES}")
        shape = [self._number(U64) for _ in range(axes)]
        kind, offset = self._number(U32), self._number(U64)
        if kind not in sizes:
            raise _HeaderError(f"the tensor {name!r} has the unknown type {kind}")
        weights, (block, size) = math.prod(shape), sizes[kind]
        if not weights or shape[0] % block:
            raise _HeaderError(
                f"the tensor {name!r} has the shape {tuple(reversed(shape))}, which is impossible for its type"
            )
        return offset, name, weights // block * size, kind, tuple(shape)

    def _text(self) -> str:
        size = self._number(U64)
        self._skip(size)
        try:
            return self.content[self.position - size : self.position].decode()
        except UnicodeDecodeError:
            raise _HeaderError("a name in the header is not UTF-8") from None

    def _number(self, kind: Struct) -> int:
        (value,) = kind.unpack_from(self.content, self.position)
        self.position += kind.size
        return int(value)

    def _skip(self, count: int) -> None:
        self.position += count
        if self.position > len(self.content):
            raise _HeaderError(TRUNCATED)
