"""pgprune compare: the paper's tables on one's own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pgprune_cli.cli.options import AsJson, Limit, Quiet, RecipeName, Set, examples, opened, progress_of
from pgprune_cli.cli.saved import of_comparison
from pgprune_cli.cli.stopping import resumable
from pgprune_cli.cli.tables import grid
from pgprune_cli.errors import UserError
from pgprune_cli.run.layout import runs_folder

EXAMPLES = examples(
    "compare smollm2-135m-30 --seeds 0,1,2 --max-windows 512",
    "compare smollm2-135m-30 --only metric --only widths-repaired",
)


def compare(
    recipe: RecipeName,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Where the runs go.  [default: runs/compare/<recipe>, or in $PGPRUNE_RUNS]"
        ),
    ] = None,
    overrides: Set = None,
    seeds: Annotated[str, typer.Option(metavar="LIST", help="Seeds of the variants that search.")] = "0",
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VARIANT", help="This row only, beside those measured earlier; repeatable.  [default: all]"
        ),
    ] = None,
    limit: Limit = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run other methods and the paper's ablation on your model. The ablation has metric, start, allocation and repair,
    each with and without.

    Long, and resumable: the same command goes on where an earlier call was stopped.
    """
    try:
        numbers = list(dict.fromkeys(int(seed) for seed in seeds.split(",")))
    except ValueError:
        raise UserError(f"--seeds {seeds}: expected whole numbers with commas, such as 0,1,2") from None
    loaded, run = opened(recipe, out, overrides or [], runs_folder() / "compare")
    from pgprune_cli.jobs.compare import cells, compare, runs_of
    from pgprune_cli.run.layout import COMPARISON_TABLE

    runs = runs_of(loaded, run, numbers, only or [])
    with resumable(lambda _: of_comparison(run, runs)):
        table = compare(loaded, run, seeds=numbers, only=only or [], max_windows=limit, progress=progress_of(quiet))
    if as_json:
        print(json.dumps(table))
        return
    headings, rows = cells(table)
    grid(headings, rows)
    print(f"{run / COMPARISON_TABLE}")
