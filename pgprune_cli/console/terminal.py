"""The terminal, as rich writes to it. The names that users give are printed as they are."""

from __future__ import annotations

import os
from typing import TextIO

from rich.console import Console


def plain_console(file: TextIO | None = None, width: int | None = None) -> Console:
    """Return a console that prints text as it is: no markup such as `[bold]`, and no emoji such as `:key:`.

    file: stdout by default. What rich renders outside a console (the text of a spinner or of a `TextColumn`) is markup
    unless it is a `Text`.
    """
    return Console(file=file, width=width, markup=False, emoji=False)


def can_redraw(console: Console) -> bool:
    """Return whether lines can be drawn over: on a terminal that is neither dumb nor the log of a CI run."""
    return console.is_interactive and not os.environ.get("CI")
