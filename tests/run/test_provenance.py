"""The commands that wrote into a run, one JSON object a line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pgprune_cli.console.commands import command_line
from pgprune_cli.run.layout import PROVENANCE_FILE
from pgprune_cli.run.provenance import read_provenance, record_command


def test_commands_with_line_separators_and_bytes_that_are_no_text_are_one_line_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions wrote U+2028 as it is, which `str.splitlines` takes for the end of a line."""
    arguments = ["runs/a\u2028b", "text/\udcff.txt", "c\x85d"]
    for argument in arguments:
        monkeypatch.setattr(sys, "argv", ["pgprune", "search", "--out", argument])
        record_command(tmp_path)
    lines = (tmp_path / PROVENANCE_FILE).read_text(encoding="ascii").splitlines()
    assert len(lines) == len(arguments)
    with (tmp_path / PROVENANCE_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(json.loads(lines[0]) | {"command": "old a\u2028b"}, ensure_ascii=False) + "\n")
    commands = [command["command"] for command in read_provenance(tmp_path)]
    assert commands == [
        *(command_line("pgprune", "search", "--out", argument) for argument in arguments),
        "old a\u2028b",
    ]
