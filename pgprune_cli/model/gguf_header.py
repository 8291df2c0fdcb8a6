"""The header of a GGUF file, read so that nothing in it is believed: counts, lengths, types, shapes and places.

The libraries that read GGUF believe it: a list of 2^60 numbers would keep them busy, and fill memory, until the machine
gives up. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from struct import Struct, error

from pgprune_cli.errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
"""Bytes that tensors begin at multiples of, where the header says no other (`general.alignment`)."""
MOST_AXES = 4
MOST_ENTRIES = 1 << 22
"""Of one list: the libraries make an object of each, and vocabularies have a sixteenth of it."""

ARCHITECTURE = "general.architecture"
U32, U64 = Struct("<I"), Struct("<Q")
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a number, by its type in a file."""
UINT32, STRING, LIST = 4, 8, 9


@dataclass(frozen=True)
class Header:
    """architecture: llama.cpp's name of it; layers: how many there are to be; weights: in all tensors together."""

    architecture: str
    layers: int
    weights: int


def read_header(path: Path) -> Header:
    """Raises UserError where the header of a GGUF file does not fit the file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Walk(content).header()
    except ImportError:
        raise UserError(f"{path.name}: reading GGUF needs the extra: pip install 'pgprune[gguf]'") from None
    except (_Damage, error, ValueError) as found:  # ValueError of an empty file, which cannot be mapped
        what = found if isinstance(found, _Damage) else "it ends within its header"
        raise UserError(f"{path}: damaged or not GGUF: {what}; fetch the model's files again") from None


class _Damage(Exception):  # noqa: N818  (it says what the file has)
    """What is wrong with a header."""


class _Walk:
    """Over a header, from its first byte to its last."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.place = content, 0
        self.numbers: dict[str, int] = {}
        self.texts: dict[str, str] = {}

    def header(self) -> Header:
        if self.content[:4] != MAGIC:
            raise _Damage("it does not begin as one")
        self.place = 4
        if (version := self._number(U32)) not in VERSIONS:
            raise _Damage(f"version {version} is not read, only {' and '.join(map(str, VERSIONS))}, little-endian")
        tensors, entries = self._number(U64), self._number(U64)
        self._past(24 * tensors + 13 * entries)  # the least that one of each takes
        self.place = 24
        for _ in range(entries):
            self._entry()
        weights = self._tensors(tensors)
        architecture = self.texts.get(ARCHITECTURE, "")
        return Header(architecture, self.numbers.get(f"{architecture}.block_count", 0), weights)

    def _entry(self) -> None:
        """A name and its value; what is looked at later is kept."""
        name, kind, begin = self._text(), self._number(U32), self.place
        if kind != LIST:
            self._values(name, kind, 1)
            if kind == STRING and name == ARCHITECTURE:
                self.texts[name] = self.content[begin + U64.size : self.place].decode(errors="replace")
            elif kind == UINT32:
                (self.numbers[name],) = U32.unpack_from(self.content, begin)
            elif name.endswith(".block_count"):
                raise _Damage(f"{name} is no number of layers")
            return
        kind, count = self._number(U32), self._number(U64)
        if count > MOST_ENTRIES:
            raise _Damage(f"{name!r} is a list of {count:,} entries; at most {MOST_ENTRIES:,} are read")
        self._values(name, kind, count)

    def _values(self, name: str, kind: int, count: int) -> None:
        """Goes past values of one type."""
        if kind in SIZES:
            self._past(count * SIZES[kind])
        elif kind == STRING:
            for _ in range(count):
                self._past(self._number(U64))
        else:
            raise _Damage(f"{name!r} is of the type {kind}, which is none that is read")

    def _tensors(self, count: int) -> int:
        """Goes past what is said of the tensors. Returns their weights."""
        from gguf import GGML_QUANT_SIZES

        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        found = [self._tensor(sizes) for _ in range(count)]
        alignment = self.numbers.get("general.alignment", ALIGNMENT)
        if alignment not in [1 << power for power in range(3, 21)]:
            raise _Damage(f"its tensors are aligned to {alignment} bytes")
        begin = end = -(-self.place // alignment) * alignment
        for place, name, size, _ in sorted(found):
            if begin + place < end:
                raise _Damage(f"the tensor {name!r} lies upon another")
            end = begin + place + size
            if end > len(self.content):
                raise _Damage(f"it ends before its tensor {name!r} does")
        return sum(weights for *_, weights in found)

    def _tensor(self, sizes: dict[int, tuple[int, int]]) -> tuple[int, str, int, int]:
        """Where a tensor begins in the data, its name, its bytes and its weights.

        `sizes`: of every type, how many weights are stored together and in how many bytes.
        """
        name, axes = self._text(), self._number(U32)
        if not 1 <= axes <= MOST_AXES:
            raise _Damage(f"the tensor {name!r} has {axes} axes")
        shape = [self._number(U64) for _ in range(axes)]
        kind, place = self._number(U32), self._number(U64)
        if kind not in sizes:
            raise _Damage(f"the tensor {name!r} is of the type {kind}, which is none that is read")
        weights, (block, size) = math.prod(shape), sizes[kind]
        if not weights or shape[0] % block:
            raise _Damage(f"the tensor {name!r} has the shape {tuple(reversed(shape))}, which its type cannot have")
        return place, name, weights // block * size, weights

    def _text(self) -> str:
        size = self._number(U64)
        self._past(size)
        try:
            return self.content[self.place - size : self.place].decode()
        except UnicodeDecodeError:
            raise _Damage("a name in it is no UTF-8") from None

    def _number(self, kind: Struct) -> int:
        (value,) = kind.unpack_from(self.content, self.place)
        self.place += kind.size
        return int(value)

    def _past(self, count: int) -> None:
        self.place += count
        if self.place > len(self.content):
            raise _Damage("it ends within its header")
