"""Writes docs/cli.md from the program's own help, so that it cannot lie.

    python scripts/write_cli_reference.py [--check]

With --check it writes nothing, and fails where the file is not what the help says.
"""

import sys
from pathlib import Path

import typer
from click.testing import CliRunner

from pgprune_cli.cli import app
from pgprune_cli.errors import ExitCode

TARGET = Path(__file__).parents[1] / "docs" / "cli.md"
EXIT_CODES = {
    ExitCode.OK: "it is done",
    ExitCode.FAILED: "the run failed (no finite loss, a full disk, …)",
    ExitCode.BAD_INPUT: "what was given is wrong: one line for every fault, on stderr",
    ExitCode.INTERRUPTED: "Ctrl-C; a search is saved, and the command that goes on is printed",
    ExitCode.TERMINATED: "SIGTERM, likewise",
}


def reference() -> str:
    """The page: exit codes, then the help of every verb."""
    program = typer.main.get_command(app)
    lines = ["# Command line", "", "Written by `make docs` from `pgprune --help`; do not edit.", ""]
    lines += ["| exit code | means |", "|---|---|"]
    lines += [f"| {int(code)} | {meaning} |" for code, meaning in EXIT_CODES.items()]
    for verb in ["", *program.commands]:
        arguments = [verb, "--help"] if verb else ["--help"]
        shown = CliRunner().invoke(program, arguments, prog_name="pgprune", terminal_width=100, max_content_width=100)
        lines += ["", f"## pgprune {verb}".rstrip(), "", "```", shown.output.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def main() -> None:
    page = reference()
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(page, encoding="utf-8")
    elif not TARGET.exists() or TARGET.read_text(encoding="utf-8") != page:
        sys.exit(f"{TARGET.name} is not what the help says; run `make docs`")


if __name__ == "__main__":
    main()
