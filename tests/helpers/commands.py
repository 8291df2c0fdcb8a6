"""Command lines, read by the program's own parser."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import typer

from pgprune_cli.cli.program import app

PROGRAM: Any = typer.main.get_command(app)


def commands_of(group: Any = PROGRAM) -> Iterator[str]:
    """Yield every command as it is typed. The commands of a group come after it."""
    for name, command in group.commands.items():
        yield name
        if hasattr(command, "commands"):
            yield from (f"{name} {subcommand}" for subcommand in commands_of(command))


def parsed(words: Sequence[str]) -> str:
    """Parse a command line without `pgprune`. Return its command, or raise the parser's own error."""
    command, context, names, rest = PROGRAM, None, [], list(words)
    while True:
        context = command.make_context(names[-1] if names else "pgprune", rest, parent=context)
        if not hasattr(command, "commands"):
            return " ".join(names)
        rest = [*context._protected_args, *context.args]
        if not rest:
            return " ".join(names)
        name, command, rest = command.resolve_command(context, rest)
        names.append(name)
