"""pgprune report: write an HTML page about runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pgprune_cli.cli.options import AsJson, Quiet, examples, run_names
from pgprune_cli.cli.tables import print_result
from pgprune_cli.storage.paths import expanded

EXAMPLES = examples(
    "report runs/smollm2-135m-30",
    "report runs/smollm2-135m-30 runs/smollm2-135m-50 --out both.html",
)


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN…",
            help="Run directories, finished or not.",
            autocompletion=run_names,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="The page to write.  [default: report.html in the run, or here for several runs]",
        ),
    ] = None,
    watch: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Rewrite the page every N seconds until all runs are finished."),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page about one or several runs.

    It shows what was done, the losses, the policy or widths, the curves of recoveries, and a comparison of several
    runs.
    """
    from pgprune_cli.jobs import report as job

    runs, out = [expanded(run) for run in runs], out and expanded(out)
    page = job.target(runs, out)
    for read in job.report(runs, page, watch):
        states = ", ".join(f"{run.name} {run.progress}" for run in read)
        if watch is not None and not quiet:
            print(f"{page}: {states}", file=sys.stderr, flush=True)
    result = {"report": str(page), "runs": [{"run": str(run.directory), "state": run.progress} for run in read]}
    print_result(result, as_json, f"{page}: {states}")
