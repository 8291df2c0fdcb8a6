"""The checksum inside a GGUF file of ours: sha256 of the whole file, with zeros where the checksum itself stands."""

from __future__ import annotations

import hashlib
from pathlib import Path

KEY = "pgprune.sha256"
EMPTY = "0" * 64
PIECE = 1 << 24
"""Bytes read at a time; the metadata up to the key, which is among the first, is shorter."""

_MARK = KEY.encode() + (8).to_bytes(4, "little") + len(EMPTY).to_bytes(8, "little")
"""What precedes the checksum: the key, the number of the type "string", and its length."""


def write_checksum(path: Path) -> None:
    """Puts the checksum into a file that was written with EMPTY under KEY."""
    place, digest = _digest(path)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(digest.encode())


def has_checksum(path: Path) -> bool:
    """Whether pgprune wrote it, damaged or not."""
    with path.open("rb") as file:
        return _MARK in file.read(PIECE)


def fault_of(path: Path) -> str:
    """What is wrong with a file with a checksum, "" if nothing is."""
    place, digest = _digest(path)
    with path.open("rb") as file:
        file.seek(place)
        if file.read(len(EMPTY)) == digest.encode():
            return ""
    return f"{path}: not what was written (another sha256 than it says it has)"


def _digest(path: Path) -> tuple[int, str]:
    """Where the checksum stands, and what it should be."""
    with path.open("rb") as file:
        head = bytearray(file.read(PIECE))
        place = head.index(_MARK) + len(_MARK)
        head[place : place + len(EMPTY)] = EMPTY.encode()
        digest = hashlib.sha256(head)
        while piece := file.read(PIECE):
            digest.update(piece)
    return place, digest.hexdigest()
