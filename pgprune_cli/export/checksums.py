"""Checksums of an exported directory: SHA256SUMS, which `sha256sum --check` reads as well.

Code in the directory is checked more strictly: it must be a file that pgprune ships, whatever SHA256SUMS says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pgprune_cli.errors import UserError
from pgprune_cli.storage.atomic import write_bytes
from pgprune_cli.storage.records import checksum, read_json

CHECKSUMS_FILE = "SHA256SUMS"
MODEL_CARD = "README.md"
"""Not listed in SHA256SUMS, because people may edit it."""

CODE = {
    "modeling_pruned.py": "be5c00bc2e798829202d76fe1ad67eb7314dfe68907d8c187c1074f6df452d2a",
    "modeling_mlx.py": "fa2b6b2f9254027caff2d3e3486889b7c36d0fcc48cdbe19353e7774d8323461",
}
"""The sha256 of each file that runs when an export is loaded."""


def write_checksums(directory: Path) -> None:
    """Write SHA256SUMS, which lists every file below `directory` except the model card."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    names = [path.relative_to(directory).as_posix() for path in paths]
    lines = [f"{checksum(directory / name)}  {name}\n" for name in names if name != MODEL_CARD]
    write_bytes(directory / CHECKSUMS_FILE, "".join(lines).encode())


def faults_of(directory: Path) -> Iterator[str]:
    """Yield one line for every file that is missing or changed, and for code that pgprune does not ship."""
    try:
        checksums = _read(directory / CHECKSUMS_FILE)
    except UserError as error:
        yield str(error)
        checksums = {}
    for name, expected in checksums.items():
        path = directory / name
        if not path.is_file():
            yield f"{path}: missing. Export again."
        elif checksum(path) != expected:
            yield f"{path}: changed since the export (its sha256 differs from {CHECKSUMS_FILE}). Export again."
    yield from _foreign_code(directory)


def refuse_changed(directory: Path) -> None:
    """Raise UserError for the first file that `faults_of` names: a new export would hide that it changed."""
    for fault in faults_of(directory):
        raise UserError(fault)


def _read(path: Path) -> dict[str, str]:
    """Return the sha256 of every file by its name. Raises UserError if SHA256SUMS is missing or damaged."""
    if not path.exists():
        raise UserError(f"{path}: missing, so the files cannot be checked. Export again.")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    matches = [re.fullmatch(r"([0-9a-f]{64})  ([^/\\]+(?:/[^/\\]+)*)", line) for line in lines]
    checksums = {match[2]: match[1] for match in matches if match and ".." not in match[2].split("/")}
    if len(checksums) != len(lines) or not checksums:
        raise UserError(f"{path}: damaged: each line must be a sha256, two spaces and a file name. Export again.")
    return checksums


def _foreign_code(directory: Path) -> Iterator[str]:
    for path in sorted(directory.rglob("*.py")):
        expected = CODE.get(path.relative_to(directory).as_posix())
        if expected is None:
            yield f"{path}: code that pgprune did not write. Remove it."
        elif checksum(path) != expected:
            yield f"{path}: differs from the code that pgprune ships under this name. Export again."
    for name in ("config.json", "tokenizer_config.json"):
        for file in _code_named_in(directory / name):
            if file not in CODE:
                yield f"{directory / name}: tells runtimes to run {file}, which is not from pgprune. Export again."


def _code_named_in(path: Path) -> Iterator[str]:
    """Yield the files that a config tells a runtime to run."""
    try:
        config = read_json(path)
    except UserError:  # not a config, so it names no code
        return
    auto_map = config.get("auto_map") or {}
    for classes in auto_map.values() if isinstance(auto_map, dict) else [auto_map]:
        for name in classes if isinstance(classes, list) else [classes]:
            if name is not None:  # a tokenizer lists two classes, and one may be absent
                yield f"{str(name).rpartition('.')[0]}.py"
    if "model_file" in config:
        yield str(config["model_file"])
