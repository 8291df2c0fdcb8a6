"""Tables in Markdown."""

from __future__ import annotations

from pgprune_cli.console.markdown import markdown_table


def test_a_bar_or_a_line_end_in_a_cell_does_not_break_the_table() -> None:
    lines = markdown_table(("name", "number"), [("a|b", 1), ("c\nd", 2)]).splitlines()
    assert lines == ["| name | number |", "| --- | --- |", "| a\\|b | 1 |", "| c d | 2 |"]
