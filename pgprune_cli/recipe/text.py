"""Print a resolved recipe for people: every key, with the comments of its file and of the shipped base `_base.yaml`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pgprune_cli.errors import UserError
from pgprune_cli.recipe.reader import by_key, dump, find, load, name_of, shipped_folder, summary
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.recipe.strict_yaml import read_text
from pgprune_cli.storage.atomic import write_bytes
from pgprune_cli.storage.paths import expanded

_LINE = re.compile(r"(?P<indent> *)(?P<name>\w+):.*?(  # (?P<comment>.*))?")


def comments() -> dict[str, str]:
    """Return the comments of `_base.yaml` by dotted key."""
    return _comments(read_text(_base()))


def annotated(recipe: Recipe, source: Path) -> str:
    """Return the recipe, read from the file `source`, as YAML with every key. It reads back to an equal recipe.

    A key has the comment that it has in its file, else that of `_base.yaml`, unless the value there is another one.
    """
    values, lines = by_key(recipe), []
    texts = [read_text(source), read_text(_base())]
    explained = [(_comments(text), _values(text)) for text in texts]
    for key, match in _keys(dump(recipe)):
        own = [known[key] for known, there in explained if key in known and there.get(key) == values.get(key)]
        lines.append(f"{match.string}  # {own[0]}" if own else match.string)
    return "\n".join(lines) + "\n"


def _base() -> Path:
    return shipped_folder() / "_base.yaml"


def _comments(text: str) -> dict[str, str]:
    """Return the comments behind the keys of a recipe by dotted key."""
    return {key: match["comment"] for key, match in _keys(text) if match["comment"]}


def _values(text: str) -> dict[str, Any]:
    """Return the values of a recipe's text by dotted key. Sections have none."""
    values: dict[str, Any] = {}
    for name, value in yaml.safe_load(text).items():
        values |= {f"{name}.{key}": entry for key, entry in value.items()} if isinstance(value, dict) else {name: value}
    return values


def _keys(text: str) -> Iterator[tuple[str, re.Match[str]]]:
    """Yield the dotted key and the match of every line with a key. Keys of a section are indented below it."""
    section = ""
    for match in filter(None, map(_LINE.fullmatch, text.splitlines())):
        name = match["name"]
        section = section if match["indent"] else name
        yield (f"{section}.{name}" if match["indent"] else name), match


def copy(name: str, to: Path | None) -> Path:
    """Write the resolved recipe `name` into the new file `to`, or `<name>.yaml` by default. Return the file.

    Raises:
        UserError: the recipe is unknown, the file exists, or its name does not end in .yaml.
    """
    source = find(name)
    path = expanded(to or Path(f"{Path(name_of(source)).name}.yaml"))
    if path.suffix != ".yaml":
        raise UserError(f"{path}: the name of a recipe file must end in .yaml.")
    if path.exists():
        raise UserError(f"{path}: exists already. Choose another file name.")
    head = f"# {summary(source)}\n" if summary(source) else ""
    write_bytes(path, f"{head}{annotated(load(source), source)}".encode())
    return path
