"""pgprune verify: check files for damage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pgprune_cli.cli.options import AsJson, examples
from pgprune_cli.cli.tables import print_result
from pgprune_cli.errors import ExitCode, UserError
from pgprune_cli.storage.paths import expanded

EXAMPLES = examples("verify runs/smollm2-135m-30")


def verify(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="A run directory, a comparison, an exported model, cached predictions, or one scores, checkpoint or "
            "decision file.",
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Check files that pgprune wrote for damage.

    Prints one line for every fault. The exit code is 1 if there is any.
    """
    if not expanded(path).exists():  # before seconds of imports
        raise UserError(f"{path}: no such file or directory")
    from dataclasses import asdict

    from pgprune_cli.jobs.verify import verify

    verdict = verify(path)
    print_result(asdict(verdict), as_json, verdict.text())
    if verdict.faults:
        raise typer.Exit(ExitCode.FAILED)
