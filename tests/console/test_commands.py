"""Command lines in messages, as a shell reads them."""

from __future__ import annotations

import subprocess

import pytest

from pgprune_cli.console.commands import command_line


@pytest.mark.parametrize(
    "word",
    ["plain", "a run/it's", "", "a\nb", "a\xa0b\u2028c", "\u200d\\'", "r\udcffun", "größe", "$HOME *", "-x"],
)
def test_a_shell_reads_the_words_that_were_meant(word: str) -> None:
    line = command_line("printf", "%s", word)
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    assert done.stdout == word.encode("utf-8", "surrogateescape")
