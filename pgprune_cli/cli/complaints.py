"""What goes wrong, said on stderr."""

from __future__ import annotations

from typing import Any

from pgprune_cli.console.stderr import STDERR
from pgprune_cli.console.suggest import nearest
from pgprune_cli.distributed import ranks_from_environment


def complain(text: str) -> None:
    """A line for every line of it, with who says it."""
    from pgprune_cli.recipe.strict_yaml import one_line

    ranks = ranks_from_environment()
    who = "pgprune" if ranks.world_size == 1 else f"pgprune, rank {ranks.rank}"
    for line in text.splitlines():  # of which parts may come from files, and so what terminals take for commands
        print(f"{who}: {one_line(line)}", file=STDERR)


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
