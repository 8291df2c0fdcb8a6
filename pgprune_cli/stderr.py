"""Standard error as a run needs it: that nobody reads it any more, behind a closed terminal or pipe, stops nothing."""

from __future__ import annotations

import io
import os
import sys
from typing import IO, cast


class Stderr(io.TextIOBase):
    """Writes to whatever `sys.stderr` is; once that fails, to nowhere."""

    def write(self, text: str) -> int:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stderr.fileno())  # what is left in its buffer goes there too
            os.close(nowhere)
        return len(text)

    def isatty(self) -> bool:
        return sys.stderr.isatty()

    def fileno(self) -> int:
        return sys.stderr.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return sys.stderr.encoding


STDERR = cast(IO[str], Stderr())
