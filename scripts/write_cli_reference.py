"""Generate docs/cli.md from the program's own --help.

    python scripts/write_cli_reference.py [--check]

With --check, write nothing and fail if the file is out of date.
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
    ExitCode.OK: "success",
    ExitCode.FAILED: "the run failed (no finite loss, a full disk, …), or `verify` or `doctor` found a fault",
    ExitCode.BAD_INPUT: "bad input (recipe, option or file): one line per fault on stderr",
    ExitCode.HUNG_UP: "stopped because the terminal closed (SIGHUP); stderr says what is saved and how to resume",
    ExitCode.INTERRUPTED: "stopped by Ctrl-C; stderr says what is saved and how to resume",
    ExitCode.TERMINATED: "stopped by SIGTERM; stderr says what is saved and how to resume",
}

VARIABLES = {
    RUNS_VARIABLE: "the directory for runs, instead of `runs`",
    "PGPRUNE_CACHE": "the directory for tokenised texts, instead of `pgprune` in the user's cache",
    "HF_HOME": "the directory of the hub's downloads and token; `HF_HUB_OFFLINE=1` uses only what is already there",
    "NO_COLOR": "set to anything: no colours, even on a terminal",
}


def verbs(group: Any) -> list[str]:
    """Return every command as it is typed; the commands of a group follow it."""
    names = []
    for name, command in group.commands.items():
        names += [name, *(f"{name} {below}" for below in verbs(command))] if hasattr(command, "commands") else [name]
    return names


def reference() -> str:
    """Return the page: exit codes, environment variables, and the help of every command."""
    program = typer.main.get_command(app)
    lines = ["# Command line", "", "Written by `make references` from `pgprune --help`; do not edit.", ""]
    lines += ["| exit code | meaning |", "|---|---|"]
    lines += [f"| {int(code)} | {meaning} |" for code, meaning in EXIT_CODES.items()]
    lines += ["", "| environment variable | meaning |", "|---|---|"]
    lines += [f"| `{name}` | {meaning} |" for name, meaning in VARIABLES.items()]
    lines += [
        "",
        "`pgprune --install-completion` sets up completion of commands, options, recipes and runs in your shell.",
    ]
    for verb in ["", *verbs(program)]:
        arguments = [*verb.split(), "--help"]
        shown = CliRunner().invoke(program, arguments, prog_name="pgprune", terminal_width=100, max_content_width=100)
        lines += ["", f"## pgprune {verb}".rstrip(), "", "```text", shown.output.rstrip(), "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    write_or_check({TARGET: reference()}, "the help")
