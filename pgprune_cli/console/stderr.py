"""Standard error for long runs: if the terminal or pipe behind it is closed, the run goes on."""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO, cast


class Stderr(io.TextIOBase):
    """Writes to the current `sys.stderr`. Once that fails, writes go nowhere."""

    def write(self, text: str) -> int:
        stream = _stream()
        try:
            stream.write(text)
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())  # what is left in the buffer goes there too
            os.close(nowhere)
        return len(text)

    def isatty(self) -> bool:
        return _stream().isatty()

    def fileno(self) -> int:
        return _stream().fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return _stream().encoding


def _stream() -> TextIO:
    """Return the real stream. While rich draws a bar, it replaces `sys.stderr` with one that writes here."""
    return cast(TextIO, getattr(sys.stderr, "rich_proxied_file", sys.stderr))


STDERR = cast(TextIO, Stderr())


def warn(text: str) -> None:
    """Print a line that no report of progress leads up to, above the bar if rich draws one."""
    is_drawing = hasattr(sys.stderr, "rich_proxied_file")
    print(f"pgprune: {text}", file=sys.stderr if is_drawing else STDERR)
