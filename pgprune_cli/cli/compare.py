"""pgprune compare: other methods and the paper's ablation on your model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pgprune_cli.cli.options import AsJson, MaxWindows, Quiet, RecipeName, Set, examples, open_recipe, progress_of
from pgprune_cli.cli.saved import NOTHING_NEW, saved_by_compare
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
            "--out",
            metavar="DIR",
            help="Directory for the runs and the table.  [default: compare/<recipe> in runs or $PGPRUNE_RUNS]",
        ),
    ] = None,
    overrides: Set = None,
    seeds: Annotated[
        str, typer.Option(metavar="LIST", help="Comma-separated seeds. Random variants run once per seed.")
    ] = "0",
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VARIANT",
            help="Run only this variant and keep earlier rows. Repeatable.  [default: all]",
        ),
    ] = None,
    max_windows: MaxWindows = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare pruning methods and an ablation on your model.

    Prints one table with the perplexity of every variant. The ablation starts from the recipe's metric and adds one
    part of the method at a time (start, widths, repair). This takes many searches. If it is interrupted, run the same
    command again to resume.
    """
    try:
        numbers = list(dict.fromkeys(int(seed) for seed in seeds.split(",")))
    except ValueError:
        raise UserError(f"--seeds {seeds}: expected comma-separated whole numbers, such as 0,1,2.") from None
    from pgprune_cli.recipe.schema import SEEDS

    if problem := next(filter(None, map(SEEDS, numbers)), ""):
        raise UserError(f"--seeds {seeds}: {problem}.")
    from pgprune_cli.run.layout import COMPARISON_TABLE

    with resumable(lambda _: NOTHING_NEW):
        loaded, run = open_recipe(recipe, out, overrides or [], runs_folder() / "compare")
        from pgprune_cli.jobs.compare import cells, compare, runs_of

        runs = runs_of(loaded, run, numbers, only or [])
    with resumable(lambda _: saved_by_compare(run, runs)):
        table = compare(
            loaded, run, seeds=numbers, only=only or [], max_windows=max_windows, progress=progress_of(quiet)
        )
    if as_json:
        print(json.dumps(table))
        return
    headings, rows = cells(table)
    grid(headings, rows)
    print(f"{run / COMPARISON_TABLE}")
