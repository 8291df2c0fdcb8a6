"""The checksums inside a GGUF export.

`pgprune.sha256` is that of the whole file, with zeros where the checksum itself is. Other tools keep it when they
rewrite the file. What they did follows from `pgprune.tensors_sha256`, the checksum of the tensors alone, and
`pgprune.file_type`, how the tensors were quantized.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

from pgprune_cli.model.gguf_header import PARTS, U32, U64, Header, read_header

KEY = "pgprune.sha256"
TENSORS_KEY = "pgprune.tensors_sha256"
TYPE_KEY = "pgprune.file_type"
"""llama.cpp's number of the quantization that pgprune wrote. A tool that quantizes changes `general.file_type` only."""
EMPTY = "0" * 64
VALUE = U32.size + U64.size
"""Where the text of an entry begins: after the number of its type and its length."""
BYTES_AT_A_TIME = 1 << 24
"""Bytes read at a time. The keys are among the first of the metadata, well within this."""


def write_checksum(path: Path) -> None:
    """Write the checksums into a file that has EMPTY under KEY and TENSORS_KEY."""
    _write(path, _position(path, TENSORS_KEY), _digest_of_tensors(path, read_header(path)))
    position = _position(path, KEY)
    _write(path, position, _digest(path, position))


def has_checksum(path: Path) -> bool:
    """Return True if pgprune wrote this file, even if it is damaged or another tool has changed it."""
    with path.open("rb") as file:
        return _prefix(KEY) in file.read(BYTES_AT_A_TIME)


def fault_of(path: Path) -> str:
    """Return what is wrong with a file that has a checksum, or "" if nothing is. Raises UserError for a bad header."""
    position = _position(path, KEY)
    if _stored(path, position) == _digest(path, position):
        return ""
    changed = _change(path, read_header(path)) if find_spec("gguf") else ""
    return f"{path}: {changed or f'changed since the export (its sha256 differs from {KEY}). Export again.'}"


def _change(path: Path, header: Header) -> str:
    """Return what another tool did to a file, or "" if that does not show."""
    if (parts := header.numbers.get(PARTS, 0)) > 1:
        return (
            f"one of {parts} parts that another tool split the export into. Join them with llama-gguf-split --merge, "
            "then verify the whole file."
        )
    now, written = header.numbers.get("general.file_type"), header.numbers.get(TYPE_KEY)
    if now is not None and written is not None and now != written:
        return (
            f"requantised since by another tool, from {_type_name(written)} to {_type_name(now)}. Its weights are no "
            "longer those that pgprune wrote, so they cannot be checked. Verify the file that it was made from."
        )
    start, _ = header.entries.get(TENSORS_KEY, (0, 0))
    if start and _stored(path, start + VALUE) == _digest_of_tensors(path, header):
        return (
            "its metadata changed since the export (keys, tokenizer or chat template). The tensors are those that "
            "pgprune wrote. Export again to have the original."
        )
    return ""


def _type_name(number: int) -> str:
    """Return llama.cpp's name of a quantization: `Q8_0`."""
    from gguf import LlamaFileType

    names = {int(kind): kind.name.removeprefix("MOSTLY_").removeprefix("ALL_") for kind in LlamaFileType}
    return names.get(number, f"type {number}")


def _digest(path: Path, position: int) -> str:
    """Return the sha256 of a file with zeros at `position`, where its own is."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        head = bytearray(file.read(BYTES_AT_A_TIME))
        head[position : position + len(EMPTY)] = EMPTY.encode()
        digest.update(head)
        while piece := file.read(BYTES_AT_A_TIME):
            digest.update(piece)
    return digest.hexdigest()


def _digest_of_tensors(path: Path, header: Header) -> str:
    """Return the sha256 of the tensors in the order of their names, wherever they are in the file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for name, tensor in sorted(header.tensors.items()):
            digest.update(f"{name} {tensor.type} {tensor.shape};".encode())
            file.seek(tensor.start)
            left = tensor.end - tensor.start
            while left:
                piece = file.read(min(left, BYTES_AT_A_TIME))
                digest.update(piece)
                left -= len(piece)
    return digest.hexdigest()


def _prefix(key: str) -> bytes:
    """Return what precedes a checksum in the file: its key, the number of the type "string", and its length."""
    return len(key).to_bytes(8, "little") + key.encode() + (8).to_bytes(4, "little") + len(EMPTY).to_bytes(8, "little")


def _position(path: Path, key: str) -> int:
    """Return where the checksum under a key begins."""
    with path.open("rb") as file:
        return file.read(BYTES_AT_A_TIME).index(_prefix(key)) + len(_prefix(key))


def _stored(path: Path, position: int) -> str:
    with path.open("rb") as file:
        file.seek(position)
        return file.read(len(EMPTY)).decode("ascii", "replace")


def _write(path: Path, position: int, digest: str) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(digest.encode())
