"""What the parser finds wrong with a command line (an unknown option, a missing argument), in this program's style."""

from __future__ import annotations

from typing import Any


def usage_fault(error: Exception) -> str | None:
    """One line that says what is wrong and where to look; "" where the parser shows all it has; None: not its error.

    The parser's classes have moved between versions of Typer, so that they are known by what they can do.
    """
    parser: Any = error
    if not hasattr(parser, "format_message"):
        return None
    if type(error).__name__ == "NoArgsIsHelpError":
        parser.show()
        return ""
    said = " ".join(parser.format_message().replace("Value error, ", "").split()).rstrip(".?")
    where = getattr(getattr(parser, "ctx", None), "command_path", "pgprune")
    return f"{said[:1].lower()}{said[1:]}; see `{where} --help`"
