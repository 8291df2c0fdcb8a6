"""Draw which folder of pgprune_cli/ imports which, between the markers of docs/architecture.md.

    python scripts/draw_imports.py [--check]

With --check, write nothing and fail if the drawing is out of date.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pgprune_cli"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- imports: begin -->", "<!-- imports: end -->"


def imports_in(tree: ast.AST) -> set[str]:
    """Return every module that a source imports, anywhere in it. `from a import b` gives a and a.b."""
    modules: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute in this project"
            modules |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def folder_of(path: Path) -> str:
    """Return the folder of a source, or the module's own name if it is at the root of the package."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def folders_imported(path: Path) -> set[str]:
    """Return the folders and root modules of pgprune_cli that a source imports, without its own."""
    modules = {name for name in imports_in(ast.parse(path.read_text())) if name.startswith("pgprune_cli.")}
    return {name.split(".")[1] for name in modules} - {folder_of(path), "__version__"}


def imports_of_folders() -> dict[str, set[str]]:
    """Return what each folder and root module imports."""
    imported: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        imported.setdefault(folder_of(path), set()).update(folders_imported(path))
    return imported


def top_down(imported: dict[str, set[str]]) -> list[str]:
    """Return the folders in an order in which each imports only later ones. Raises ValueError if there is a circle."""
    remaining, order = dict(imported), []
    while remaining:
        tops = sorted(name for name in remaining if not any(name in below for below in remaining.values()))
        if not tops:
            raise ValueError(f"these folders import each other in a circle: {', '.join(sorted(remaining))}")
        order += tops
        remaining = {name: below for name, below in remaining.items() if name not in tops}
    return order


def drawing() -> str:
    """Return one line per folder with what it imports directly, without what those import in turn."""
    imported = imports_of_folders()
    order = top_down(imported)
    reached: dict[str, set[str]] = {}
    for name in reversed(order):
        reached[name] = imported[name].union(*(reached[below] for below in imported[name]))
    lines = []
    for name in order:
        direct = {below for below in imported[name] if not any(below in reached[folder] for folder in imported[name])}
        lines.append(f"{name:<12} → {', '.join(sorted(direct, key=order.index))}" if direct else name)
    return "\n".join(lines)


def page() -> str:
    """Return docs/architecture.md with the current drawing between its markers."""
    block = f"{BEGIN}\n```text\n{drawing()}\n```\n{END}"
    text = PAGE.read_text(encoding="utf-8")
    assert BEGIN in text and END in text, f"{PAGE.name} has no import markers"
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: block, text, flags=re.DOTALL)


if __name__ == "__main__":
    from reference import write_or_check  # beside this script, which the tests import as a module

    write_or_check({PAGE: page()}, "the code")
