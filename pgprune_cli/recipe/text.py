"""A resolved recipe as text that a person reads and edits: every key, with what the shipped base says of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pgprune_cli.errors import UserError
from pgprune_cli.recipe.reader import dump, find, load, name_of, shipped_folder, summary
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.recipe.strict_yaml import read_text
from pgprune_cli.storage.atomic import write_bytes

_LINE = re.compile(r"(?P<indent> *)(?P<name>\w+):.*?(  # (?P<comment>.*))?")


def comments() -> dict[str, str]:
    """What `_base.yaml` says of each key, by its dotted name: what it does, what it costs."""
    found = _keys(read_text(shipped_folder() / "_base.yaml"))
    return {key: match["comment"] for key, match in found if match["comment"]}


def annotated(recipe: Recipe) -> str:
    """The whole recipe as YAML, nothing left to defaults, with comments; it reads back to an equal one."""
    known = comments()
    lines = [f"{match.string}  # {known[key]}" if key in known else match.string for key, match in _keys(dump(recipe))]
    return "\n".join(lines) + "\n"


def _keys(text: str) -> Iterator[tuple[str, re.Match[str]]]:
    """The lines of a recipe that hold a key, with its dotted name: sections at the margin, their keys below them."""
    section = ""
    for match in filter(None, map(_LINE.fullmatch, text.splitlines())):
        name = match["name"]
        section = section if match["indent"] else name
        yield (f"{section}.{name}" if match["indent"] else name), match


def copy(name: str, to: Path | None) -> Path:
    """Writes the recipe `name`, resolved, into the new file `to` (or `<name>.yaml` here). Returns the file.

    Raises UserError for an unknown recipe, a file that exists and a name that no recipe file can have.
    """
    source = find(name)
    path = to or Path(f"{Path(name_of(source)).name}.yaml")
    if path.suffix != ".yaml":
        raise UserError(f"{path}: a recipe's file should end in .yaml")
    if path.exists():
        raise UserError(f"{path}: exists already; give another file")
    head = f"# {summary(source)}\n" if summary(source) else ""
    write_bytes(path, f"{head}{annotated(load(source))}".encode())
    return path
