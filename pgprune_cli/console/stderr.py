"""Standard error as a run needs it: that nobody reads it any more, behind a closed terminal or pipe, stops nothing."""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO, cast


class Stderr(io.TextIOBase):
    """Writes to whatever `sys.stderr` is; once that fails, to nowhere."""

    def write(self, text: str) -> int:
        stream = _stream()
        try:
            stream.write(text)
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())  # what is left in its buffer goes there too
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
    """Not the one that rich puts in its place while a bar is drawn: that draws by writing here."""
    return cast(TextIO, getattr(sys.stderr, "rich_proxied_file", sys.stderr))


STDERR = cast(TextIO, Stderr())
