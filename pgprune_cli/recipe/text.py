"""Print a resolved recipe for people: every key, with the comment of the shipped base `_base.yaml`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pgprune_cli.errors import UserError
from pgprune_cli.recipe.reader import dump, find, load, name_of, shipped_folder, summary
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.recipe.strict_yaml import read_text
from pgprune_cli.storage.atomic import write_bytes
from pgprune_cli.storage.paths import expanded

_LINE = re.compile(r"(?P<indent> *)(?P<name>\w+):.*?(  # (?P<comment>.*))?")


def comments() -> dict[str, str]:
    """Return the comments of `_base.yaml` by dotted key."""
    keys = _keys(read_text(shipped_folder() / "_base.yaml"))
    return {key: match["comment"] for key, match in keys if match["comment"]}


def annotated(recipe: Recipe) -> str:
    """Return the recipe as YAML with every key and comments. It reads back to an equal recipe."""
    known = comments()
    lines = [f"{match.string}  # {known[key]}" if key in known else match.string for key, match in _keys(dump(recipe))]
    return "\n".join(lines) + "\n"


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
    write_bytes(path, f"{head}{annotated(load(source))}".encode())
    return path
