"""pgprune verify: whether what was written is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pgprune_cli.cli.options import AsJson, examples
from pgprune_cli.cli.tables import print_result
from pgprune_cli.errors import ExitCode, UserError

EXAMPLES = examples("verify runs/smollm2-135m-30")


def verify(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="Scores, a checkpoint, a decision, a run directory or an exported model."),
    ],
    as_json: AsJson = False,
) -> None:
    """Check that what pgprune wrote is whole. Exit code 1, and a line for every damage, where it is not."""
    if not path.expanduser().exists():  # before seconds go by in imports
        raise UserError(f"{path}: no such file or directory")
    from dataclasses import asdict

    from pgprune_cli.jobs.verify import verify

    verdict = verify(path)
    print_result(asdict(verdict), as_json, verdict.text())
    if verdict.faults:
        raise typer.Exit(ExitCode.FAILED)
