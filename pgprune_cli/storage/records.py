"""Read and write JSON records with checksums, and read safetensors. Damaged files are refused."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgprune_cli.errors import UserError
from pgprune_cli.storage.atomic import write_bytes

if TYPE_CHECKING:
    from torch import Tensor

CHECKSUM = "sha256"


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Raises ValueError for NaN and infinity, which are not JSON."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write `record` as JSON, atomically, with a checksum of its content."""
    write_json(path, with_checksum(record))


def with_checksum(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record with a checksum of its other keys."""
    content = {key: value for key, value in record.items() if key != CHECKSUM}
    return content | {CHECKSUM: json_digest(content)}


def json_digest(value: Any) -> str:
    """Return the sha256 of a value that JSON can hold. The order of keys makes no difference."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of tensors on the CPU with their names, dtypes and shapes, as hex."""
    from torch import uint8

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(uint8).numpy().data)
    return digest.hexdigest()


def finite(value: float) -> float | None:
    """Return the value, or None if JSON cannot hold it."""
    return value if math.isfinite(value) else None


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises UserError if the file cannot be read or holds no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from None
    if not isinstance(value, dict):
        got = "nothing" if value is None else f"a {type(value).__name__}"
        raise UserError(f"{path}: expected a JSON object, got {got}.")
    return value


def read_record(path: Path) -> dict[str, Any]:
    """Return the record that `write_record` wrote. Raises UserError if it is damaged or has no checksum."""
    record = read_json(path)
    if record != with_checksum(record):
        raise UserError(f"{path}: damaged: it does not match its checksum.")
    return {key: value for key, value in record.items() if key != CHECKSUM}


def refuse_newer(path: Path, version: object, known: int) -> None:
    """Raise UserError if the file was written by a newer version of pgprune."""
    if isinstance(version, int) and version > known:
        raise UserError(
            f"{path}: written by a newer pgprune (file version {version}, this one reads {known}). Upgrade pgprune."
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file, on the CPU. Raises UserError if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or not safetensors ({error}).") from None


def metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def checksum(path: Path) -> str:
    """Return the sha256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
