"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table. A `|` in a cell is escaped, so that a name cannot add a column."""
    lines = [[_cell(cell) for cell in cells] for cells in (headings, *rows)]
    lines.insert(1, ["---"] * len(headings))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(value: object) -> str:
    return " ".join(str(value).splitlines()).replace("|", "\\|")
