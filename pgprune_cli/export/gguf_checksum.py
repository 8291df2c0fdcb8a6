"""The checksum inside a GGUF export: sha256 of the whole file, with zeros where the checksum itself is."""

from __future__ import annotations

import hashlib
from pathlib import Path

KEY = "pgprune.sha256"
EMPTY = "0" * 64
BYTES_AT_A_TIME = 1 << 24
"""Bytes read at a time. The key is among the first of the metadata, well within this."""

_PREFIX = KEY.encode() + (8).to_bytes(4, "little") + len(EMPTY).to_bytes(8, "little")
"""What precedes the checksum in the file: its key, the number of the type "string", and its length."""


def write_checksum(path: Path) -> None:
    """Write the checksum into a file that has EMPTY under KEY."""
    position, digest = _digest(path)
    with path.open("r+b") as file:
        file.seek(position)
        file.write(digest.encode())


def has_checksum(path: Path) -> bool:
    """Return True if pgprune wrote this file, even if it is damaged now."""
    with path.open("rb") as file:
        return _PREFIX in file.read(BYTES_AT_A_TIME)


def fault_of(path: Path) -> str:
    """Return what is wrong with a file that has a checksum, or "" if nothing is."""
    position, digest = _digest(path)
    with path.open("rb") as file:
        file.seek(position)
        if file.read(len(EMPTY)) == digest.encode():
            return ""
    return f"{path}: changed since the export (its sha256 differs from {KEY}). Export again."


def _digest(path: Path) -> tuple[int, str]:
    """Return the position of the checksum in the file, and what it should be."""
    with path.open("rb") as file:
        head = bytearray(file.read(BYTES_AT_A_TIME))
        position = head.index(_PREFIX) + len(_PREFIX)
        head[position : position + len(EMPTY)] = EMPTY.encode()
        digest = hashlib.sha256(head)
        while piece := file.read(BYTES_AT_A_TIME):
            digest.update(piece)
    return position, digest.hexdigest()
