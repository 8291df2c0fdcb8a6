"""What is said goes where sys.stderr goes; where that is gone, nowhere, and nothing stops."""

from __future__ import annotations

import subprocess
import sys

import pytest
from rich.live import Live

from pgprune_cli.console.stderr import STDERR
from pgprune_cli.search.progress import SearchProgress


def test_what_is_said_is_read(capsys) -> None:
    print("a word", file=STDERR)
    assert capsys.readouterr().err == "a word\n"


def test_a_bar_that_is_drawn_meanwhile_is_no_circle(capfd) -> None:
    progress = SearchProgress(3, {"ffn": [4, 4]}, "50% of parameters go")
    with Live("a bar", console=progress.console, redirect_stderr=True):
        print("a word", file=STDERR)
        print("another", file=sys.stderr)
    err = capfd.readouterr().err
    assert "a word" in err and "another" in err


@pytest.mark.parametrize("reader", ["gone", "there"])
def test_a_reader_that_has_gone_stops_nothing(reader) -> None:
    code = (
        "import sys; from pgprune_cli.console.stderr import STDERR\n"
        "sys.stdin.readline()\n"
        "for _ in range(3): print('a word' * 10000, file=STDERR)\n"
        "print('done')"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        if reader == "gone":
            process.stderr.close()
            process.stderr = None
        out, err = process.communicate("\n", timeout=60)
    assert (process.returncode, out) == (0, "done\n")
    assert reader == "gone" or len(err) == 3 * (6 * 10000 + 1)
