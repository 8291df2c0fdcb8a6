"""Command lines as the real parser reads them, for whoever checks that one would be accepted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import typer

from pgprune_cli.cli.program import app

PROGRAM: Any = typer.main.get_command(app)


def verbs(group: Any = PROGRAM) -> Iterator[str]:
    """Every verb as it is typed, those of a group behind it."""
    for name, command in group.commands.items():
        yield name
        yield from (f"{name} {below}" for below in (verbs(command) if hasattr(command, "commands") else ()))


def parsed(words: Sequence[str]) -> str:
    """The verb of a command line without `pgprune`; raises the parser's own error for one it would refuse."""
    command, context, names, left = PROGRAM, None, [], list(words)
    while True:
        context = command.make_context(names[-1] if names else "pgprune", left, parent=context)
        if not hasattr(command, "commands"):
            return " ".join(names)
        left = [*context._protected_args, *context.args]
        if not left:
            return " ".join(names)
        name, command, left = command.resolve_command(context, left)
        names.append(name)
