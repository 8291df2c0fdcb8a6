"""What goes wrong, said on stderr."""

from __future__ import annotations

from pgprune_cli.console.stderr import STDERR
from pgprune_cli.distributed import of_environment


def complain(text: str) -> None:
    """A line for every line of it, with who says it."""
    from pgprune_cli.recipe.strict_yaml import one_line

    ranks = of_environment()
    who = "pgprune" if ranks.world == 1 else f"pgprune, rank {ranks.rank}"
    for line in text.splitlines():  # of which parts may come from files, and so what terminals take for commands
        print(f"{who}: {one_line(line)}", file=STDERR)
