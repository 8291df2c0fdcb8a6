"""The commands that wrote into a run, one JSON object a line."""

from __future__ import annotations

import errno
import json
import os
import resource
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


def test_a_line_that_was_cut_short_takes_nothing_of_the_next_one_with_it(tmp_path: Path) -> None:
    (tmp_path / PROVENANCE_FILE).write_text('{"command": "pgpr')
    for _ in range(2):
        record_command(tmp_path)
    assert len(read_provenance(tmp_path)) == 2
    assert (tmp_path / PROVENANCE_FILE).read_bytes().count(b"\n") == 3


def test_a_command_that_cannot_be_recorded_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError) as failed:
            record_command(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert failed.value.errno == errno.EFBIG
    assert failed.value.filename == str(tmp_path / PROVENANCE_FILE)
    record_command(tmp_path)
    assert len(read_provenance(tmp_path)) == 1


def test_a_recorded_command_is_synced_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    record_command(tmp_path)
    assert synced == [(tmp_path / PROVENANCE_FILE).stat().st_ino, tmp_path.stat().st_ino]
