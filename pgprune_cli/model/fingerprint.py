"""The fingerprint of a model: a digest of its config, of its tokenizer and of every tensor in its files.

It consists of *parts*, so that it can say what differs: every key of the config, every file of the tokenizer, and the
tensors of every layer. How the tensors are distributed over files makes no difference.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pgprune_cli.errors import UserError
from pgprune_cli.model.gguf_header import read_header
from pgprune_cli.storage.records import json_digest, read_json
from pgprune_cli.storage.safetensors_file import stored_tensors

Parts = Mapping[str, str]
"""The digest of every part, by its name."""

READ_WHOLE = 1 << 30
"""Up to this many bytes, every byte of the weights is read. In larger models, every tensor is sampled."""
SAMPLES, SAMPLE_BYTES = 16, 1 << 12
"""How many samples of a tensor are read, and their size: 64 KiB of a tensor at most, 47 MB of a 70B model."""
BYTES_AT_A_TIME = 1 << 20

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "tekken.json", "*.model", "*.tiktoken"),
)
"""Patterns of the files that decide the ids of tokens."""

NO_EFFECT = ("transformers_version", "_name_or_path", "name_or_path", "chat_template", "tokenizer.chat_template")
"""Keys that change no number that a search computes. In a GGUF file, neither do those under `general.`."""
GENERAL = "general."
EFFECTIVE = ("general.architecture", "general.alignment")


def parts_of(directory: Path, gguf: str | None, weight_files: Sequence[Path]) -> dict[str, str]:
    """Return the parts of a model's fingerprint. Raises UserError for files that are damaged.

    gguf: name of the weight file if it is GGUF, else None.
    """
    if gguf is not None:
        return _parts_of_gguf(directory / gguf)
    parts = _parts_of_json(directory / "config.json")
    for path in sorted({path for pattern in TOKENIZER_FILES for path in directory.glob(pattern)}):
        parts |= _parts_of_tokenizer_file(path)
    tensors = [
        (name, f"{tensor.dtype} {list(tensor.shape)}", path, tensor.start, tensor.end)
        for path in weight_files
        for name, tensor in stored_tensors(path).items()
    ]
    return parts | _parts_of_tensors(tensors)


def digest(parts: Parts) -> str:
    """Return the fingerprint of a model: the sha256 of all its parts."""
    return json_digest(parts)


def difference(before: Parts, now: Parts) -> str:
    """Return the parts that differ, in words: the first three by name, then the number of others."""
    names = sorted((name for name in before.keys() | now.keys() if before.get(name) != now.get(name)), key=_in_order)
    rest = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def _in_order(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts numbers in names by their value."""
    return [(int(piece) if piece.isdigit() else 0, piece) for piece in re.split(r"(\d+)", name)]


def _parts_of_json(path: Path) -> dict[str, str]:
    """Return a part for every key of a JSON file that has an effect."""
    return {
        f"{path.name}: {key}": json_digest(value)[:16] for key, value in read_json(path).items() if key not in NO_EFFECT
    }


def _parts_of_tokenizer_file(path: Path) -> dict[str, str]:
    """Return a part for a file, or one for every key if it is the tokenizer's config, which may hold a template."""
    if path.name == "tokenizer_config.json":
        with suppress(UserError):  # not JSON: whether it can be used shows when the tokenizer is loaded
            return _parts_of_json(path)
    with path.open("rb") as file:
        return {path.name: hashlib.file_digest(file, "sha256").hexdigest()[:16]}


def _parts_of_gguf(path: Path) -> dict[str, str]:
    header, parts = read_header(path), {}
    with path.open("rb") as file:
        for key, (start, end) in header.entries.items():
            if key in EFFECTIVE or not (key in NO_EFFECT or key.startswith(GENERAL)):
                file.seek(start)
                parts[key] = hashlib.sha256(file.read(end - start)).hexdigest()[:16]
    tensors = [(name, f"{each.type} {each.shape}", path, each.start, each.end) for name, each in header.tensors.items()]
    return parts | _parts_of_tensors(tensors)


def _parts_of_tensors(tensors: Iterable[tuple[str, str, Path, int, int]]) -> dict[str, str]:
    """Return a part for every layer and for every tensor outside of the layers.

    tensors: name, description of dtype and shape, and where the bytes are: file, start and end.
    """
    tensors = sorted(tensors)
    is_small = sum(end - start for *_, start, end in tensors) <= READ_WHOLE
    digests: dict[str, Any] = {}
    for name, description, path, start, end in tensors:
        layer = re.match(r"(.*?\.\d+)\.", name)
        part = digests.setdefault(layer[1] if layer else name, hashlib.sha256())
        part.update(f"{name} {description};".encode())
        with path.open("rb") as file:
            for position, size in _samples(start, end, whole=is_small):
                file.seek(position)
                part.update(file.read(size))
    return {name: part.hexdigest()[:16] for name, part in digests.items()}


def _samples(start: int, end: int, *, whole: bool) -> Iterator[tuple[int, int]]:
    """Yield positions and sizes of what is read of a tensor: all of it, or samples from its first to its last byte."""
    size = BYTES_AT_A_TIME if whole else SAMPLE_BYTES
    count = -(-(end - start) // size)
    if whole or count <= SAMPLES:
        positions = [start + index * size for index in range(count)]
    else:
        positions = [start + (end - start - size) * index // (SAMPLES - 1) for index in range(SAMPLES)]
    yield from ((position, min(size, end - position)) for position in positions)
