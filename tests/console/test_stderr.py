"""STDERR writes to sys.stderr as it is now. If nobody reads it any more, nothing stops."""

from __future__ import annotations

import subprocess
import sys

import pytest
from rich.console import Console
from rich.live import Live

from pgprune_cli.console.stderr import STDERR, warn


def test_a_line_arrives_on_stderr(capsys) -> None:
    print("a word", file=STDERR)
    assert capsys.readouterr().err == "a word\n"


def test_lines_printed_during_a_live_view_do_not_recurse(capfd) -> None:
    with Live("a bar", console=Console(file=STDERR), redirect_stderr=True):
        print("a word", file=STDERR)
        print("another", file=sys.stderr)
        warn("something")
    err = capfd.readouterr().err
    assert "a word" in err and "another" in err
    assert "pgprune: something" in err


def test_a_warning_says_whose_it_is(capsys) -> None:
    warn("something")
    assert capsys.readouterr().err == "pgprune: something\n"


@pytest.mark.parametrize("reader", ["closed", "open"])
def test_a_closed_pipe_stops_nothing(reader) -> None:
    code = (
        "import sys; from pgprune_cli.console.stderr import STDERR, warn\n"
        "sys.stdin.readline()\n"
        "for _ in range(3): print('a word' * 10000, file=STDERR)\n"
        "print('done')"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        if reader == "closed":
            process.stderr.close()
            process.stderr = None
        out, err = process.communicate("\n", timeout=60)
    assert (process.returncode, out) == (0, "done\n")
    assert reader == "closed" or len(err) == 3 * (6 * 10000 + 1)
