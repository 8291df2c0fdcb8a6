"""Folders of pgprune_cli/ import downward only."""

from __future__ import annotations

import ast

import pytest
from helpers.scripts import script_module

DRAW = script_module("draw_imports")
SOURCES = {str(path.relative_to(DRAW.PACKAGE)): path for path in sorted(DRAW.PACKAGE.rglob("*.py"))}
ROOT_MODULES = {"__init__", "__main__", "api", "errors", "distributed"}

BASE = {"storage", "console", "distributed", "core", "errors"}
INPUT = BASE | {"model", "recipe", "data"}
SEARCH = INPUT | {"run", "forward", "scores", "repair"}
JOBS = SEARCH | {"estimate", "search", "recover", "report", "export", "serving"}
ALLOWED: dict[str, set[str]] = {
    "__main__": {"cli"},
    "__init__": {"api"},
    "cli": JOBS | {"jobs"},
    "api": JOBS | {"jobs"},
    "jobs": JOBS,
    "report": {"run"} | INPUT,
    "export": {"run", "serving"} | INPUT,
    "estimate": SEARCH | {"search", "recover"},
    "search": SEARCH,
    "recover": SEARCH,
    "repair": INPUT | {"run", "forward", "scores"},
    "scores": INPUT | {"forward"},
    "forward": INPUT,
    "run": INPUT,
    "model": BASE | {"serving"},
    "recipe": BASE,
    "data": BASE | {"demo"},
    "storage": {"errors"},
    "console": {"errors"},
    "distributed": {"errors"},
    "serving": set(),
    "core": set(),
    "demo": set(),
    "errors": set(),
}
"""What each folder, and each module at the root, may import of the package. Any may import `__version__`."""


def test_the_parser_sees_every_kind_of_import() -> None:
    source = "import a.b\ndef f():\n    from pgprune_cli import cli\nif t:\n    from c.d import e as g\n"
    assert DRAW.imports_in(ast.parse(source)) == {"a.b", "pgprune_cli", "pgprune_cli.cli", "c.d", "c.d.e"}


@pytest.mark.parametrize("name", SOURCES)
def test_source_imports_only_what_its_folder_may(name: str) -> None:
    path = SOURCES[name]
    folder = DRAW.folder_of(path)
    assert folder in ALLOWED, f"add a row for {folder} to the table in this test"
    forbidden = DRAW.folders_imported(path) - ALLOWED[folder]
    assert not forbidden, f"{name} must not import {sorted(forbidden)}"


def test_table_has_no_circle() -> None:
    assert len(DRAW.top_down(ALLOWED)) == len(ALLOWED)


def test_table_has_a_row_for_every_folder_and_no_other() -> None:
    assert {DRAW.folder_of(path) for path in SOURCES.values()} == set(ALLOWED)


def test_circle_is_refused() -> None:
    with pytest.raises(ValueError, match="a, b"):
        DRAW.top_down({"a": {"b"}, "b": {"a"}})


def test_package_root_holds_exactly_five_modules() -> None:
    assert {path.stem for path in DRAW.PACKAGE.glob("*.py")} == ROOT_MODULES
