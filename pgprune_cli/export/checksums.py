"""What says that an exported directory is as it was written: SHA256SUMS, which `sha256sum --check` reads as well.

The code in it is held to more: it must be a file that some pgprune shipped, whatever SHA256SUMS says of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pgprune_cli.errors import UserError
from pgprune_cli.storage.atomic import write_bytes
from pgprune_cli.storage.records import checksum, read_json

CHECKSUMS_FILE = "SHA256SUMS"
CARD = "README.md"
"""Not in the list: it is there for people to edit."""

CODE = {
    "modeling_pruned.py": ("08901e45e802b4adb51ed07dc8394b75a94433fbf10f42d907c24ef7cc2cb68f",),
    "modeling_mlx.py": ("fcdd4f2e28c29db30c0763c904a8f2bf02b8817a96f92e47f73c761c383b9787",),
}
"""The sha256 of every version of the files that run where an export is loaded, the newest first."""


def write_checksums(directory: Path) -> None:
    """Lists every file below `directory` but the card."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    names = [path.relative_to(directory).as_posix() for path in paths]
    lines = [f"{checksum(directory / name)}  {name}\n" for name in names if name != CARD]
    write_bytes(directory / CHECKSUMS_FILE, "".join(lines).encode())


def faults_of(directory: Path) -> Iterator[str]:
    """What is not as it was written, and what would run that pgprune did not put there; a line each."""
    try:
        checksums = _read(directory / CHECKSUMS_FILE)
    except UserError as error:
        yield str(error)
        checksums = {}
    for name, wanted in checksums.items():
        path = directory / name
        if not path.is_file():
            yield f"{path}: missing"
        elif checksum(path) != wanted:
            yield f"{path}: not what was written (another sha256 than in {CHECKSUMS_FILE})"
    yield from _foreign_code(directory)


def _read(path: Path) -> dict[str, str]:
    """sha256 by file name. Raises UserError."""
    if not path.exists():
        raise UserError(f"{path}: missing, and nothing else says what the files were; export again")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [re.fullmatch(r"([0-9a-f]{64})  ([^/\\]+(?:/[^/\\]+)*)", line) for line in lines]
    checksums = {match[2]: match[1] for match in found if match and ".." not in match[2].split("/")}
    if len(checksums) != len(lines) or not checksums:
        raise UserError(f"{path}: damaged: a line is not a sha256, two spaces and a file name; export again")
    return checksums


def _foreign_code(directory: Path) -> Iterator[str]:
    for path in sorted(directory.rglob("*.py")):
        known = CODE.get(path.relative_to(directory).as_posix())
        if known is None:
            yield f"{path}: code that pgprune did not put there"
        elif checksum(path) not in known:
            yield f"{path}: not the code that pgprune put there, nor any that it ever did"
    for name in ("config.json", "tokenizer_config.json"):
        for file in _code_named_by(directory / name):
            if file not in CODE:
                yield f"{directory / name}: tells runtimes to run {file}, which is not pgprune's"


def _code_named_by(path: Path) -> Iterator[str]:
    """The files that a config tells a runtime to run."""
    try:
        config = read_json(path)
    except UserError:  # no config names no code
        return
    named = config.get("auto_map") or {}
    for classes in named.values() if isinstance(named, dict) else [named]:
        for name in classes if isinstance(classes, list) else [classes]:
            if name is not None:  # of a tokenizer's two classes, one may be absent
                yield f"{str(name).rpartition('.')[0]}.py"
    if "model_file" in config:
        yield str(config["model_file"])
