"""What the parser finds wrong with a command line (an unknown option, a missing argument), in this program's style."""

from __future__ import annotations

from typing import Any

from pgprune_cli.console.suggest import nearest


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
    where = getattr(getattr(parser, "ctx", None), "command_path", "pgprune")
    if possible := getattr(parser, "possibilities", None):  # which the parser would list by the alphabet
        meant = nearest(parser.option_name, possible) or ";"
        return f"no such option: {parser.option_name}{meant} see `{where} --help`"
    said = " ".join(parser.format_message().replace("Value error, ", "").split()).rstrip(".?")
    said = said.replace(". Did you mean ", ", did you mean ")
    return f"{said[:1].lower()}{said[1:]}; see `{where} --help`"
