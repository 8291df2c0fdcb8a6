"""Commands in messages, which a shell must read as they were meant."""

from __future__ import annotations

import os
import shlex


def command_line(*words: object) -> str:
    """Return a command line with every word quoted where a shell needs it. All of its characters are printable."""
    return " ".join(_quoted(str(word)) for word in words)


def _quoted(word: str) -> str:
    """Return a word as a shell reads it. Messages escape what is not printable, so such bytes are escaped here."""
    if word.isprintable():
        return shlex.quote(word)
    return "$'" + "".join(_escaped(byte) for byte in os.fsencode(word)) + "'"


def _escaped(byte: int) -> str:
    return chr(byte) if 32 <= byte < 127 and byte not in b"\\'" else f"\\x{byte:02x}"
