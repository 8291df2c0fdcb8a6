"""JSON and safetensors records: written whole, with a checksum, and refused when damaged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgprune_cli.errors import UserError
from pgprune_cli.storage.atomic import write_bytes

if TYPE_CHECKING:
    from torch import Tensor

CHECKSUM = "sha256"


def write_json(path: Path, value: Any) -> None:
    """Like `write_bytes`, an object as indented JSON. NaN and infinity are refused: they are not JSON."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Like `write_json`, with a checksum of its own."""
    write_json(path, with_checksum(record))


def with_checksum(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its own checksum: a digit that flipped is as bad as a tensor that did."""
    rest = {key: value for key, value in record.items() if key != CHECKSUM}
    return rest | {CHECKSUM: hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of ours. Raises UserError when it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def read_record(path: Path) -> dict[str, Any]:
    """Return the record that `write_record` wrote. Raises UserError if it is damaged or has no checksum."""
    record = read_json(path)
    if record != with_checksum(record):
        raise UserError(f"{path}: damaged: does not match its checksum")
    return {key: value for key, value in record.items() if key != CHECKSUM}


def refuse_newer(path: Path, version: object, known: int) -> None:
    """Raises UserError for a file of a pgprune that is newer than this one."""
    if isinstance(version, int) and version > known:
        raise UserError(f"{path}: of a newer pgprune (version {version}, this one reads {known}); upgrade pgprune")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises UserError when it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or not safetensors ({error})") from None


def metadata(path: Path) -> dict[str, str]:
    """What a whole safetensors file says of itself."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def checksum(path: Path) -> str:
    """sha256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
