"""pgprune runs: list runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pgprune_cli.cli.complaints import complain
from pgprune_cli.cli.options import AsJson, examples
from pgprune_cli.cli.tables import grid
from pgprune_cli.run.layout import runs_folder
from pgprune_cli.storage.paths import expanded

EXAMPLES = examples("runs", "runs runs/compare --json")


def runs(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="Where to look for runs, recursively.  [default: runs, or $PGPRUNE_RUNS]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List runs with their progress and results.

    Shows the sparsity, the held-out loss and what `pgprune eval` measured; for a recovery, the divergence from the
    dense model before and after.
    """
    from pgprune_cli.jobs.runs import cells, runs_in

    folder = expanded(folder or runs_folder())
    rows = runs_in(folder)
    if as_json:
        print(json.dumps({"runs": rows}))
        return
    if not rows:
        complain(f"{folder}: no runs here.")
        return
    grid(*cells(rows), texts=3)
    for row in rows:
        if row["fault"]:
            complain(row["fault"])
