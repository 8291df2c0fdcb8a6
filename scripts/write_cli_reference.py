"""Writes docs/cli.md from the program's own help, so that it cannot lie.

    python scripts/write_cli_reference.py [--check]

With --check it writes nothing, and fails where the file is not what the help says.
"""

from pathlib import Path
from typing import Any

import typer
from click.testing import CliRunner
from reference import write_or_check

from pgprune_cli.cli.program import app
from pgprune_cli.errors import ExitCode
from pgprune_cli.run.layout import RUNS_VARIABLE

TARGET = Path(__file__).parents[1] / "docs" / "cli.md"
EXIT_CODES = {
    ExitCode.OK: "it is done",
    ExitCode.FAILED: "the run failed (no finite loss, a full disk, …)",
    ExitCode.BAD_INPUT: "what was given is wrong: one line for every fault, on stderr",
    ExitCode.INTERRUPTED: "Ctrl-C; what is saved is said, and the command that goes on",
    ExitCode.TERMINATED: "SIGTERM, likewise",
}

VARIABLES = {
    RUNS_VARIABLE: "where runs go and are looked for, instead of `runs`",
    "PGPRUNE_CACHE": "where tokenised texts are kept, instead of `pgprune` in the user's cache",
    "HF_HOME": "where the hub's downloads and its token lie; `HF_HUB_OFFLINE=1` uses what lies there and asks nobody",
    "NO_COLOR": "set to anything: no colours, on a terminal either",
}


def verbs(group: Any) -> list[str]:
    """Every command as it is typed, those of a group behind it."""
    found = []
    for name, command in group.commands.items():
        found += [name, *(f"{name} {below}" for below in verbs(command))] if hasattr(command, "commands") else [name]
    return found


def reference() -> str:
    """The page: exit codes, then the help of every verb."""
    program = typer.main.get_command(app)
    lines = ["# Command line", "", "Written by `make references` from `pgprune --help`; do not edit.", ""]
    lines += ["| exit code | means |", "|---|---|"]
    lines += [f"| {int(code)} | {meaning} |" for code, meaning in EXIT_CODES.items()]
    lines += ["", "| environment variable | means |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in VARIABLES.items()]
    lines += ["", "`pgprune --install-completion` teaches the shell to complete verbs, options, recipes and runs."]
    for verb in ["", *verbs(program)]:
        arguments = [*verb.split(), "--help"]
        shown = CliRunner().invoke(program, arguments, prog_name="pgprune", terminal_width=100, max_content_width=100)
        lines += ["", f"## pgprune {verb}".rstrip(), "", "```text", shown.output.rstrip(), "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    write_or_check({TARGET: reference()}, "the help")
