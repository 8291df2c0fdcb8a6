"""pgprune init-scores: score every unit of a model."""

from __future__ import annotations

from typing import Annotated

import typer

from pgprune_cli.cli.options import (
    AsJson,
    Out,
    Quiet,
    RecipeName,
    Set,
    examples,
    metric_names,
    open_recipe,
    progress_of,
)
from pgprune_cli.cli.saved import NOTHING_NEW, saved_by_init_scores
from pgprune_cli.cli.stopping import resumable
from pgprune_cli.cli.tables import print_result
from pgprune_cli.console.suggest import either, nearest
from pgprune_cli.errors import UserError

EXAMPLES = examples("init-scores smollm2-135m-30", "init-scores demo --metric magnitude")


def init_scores(
    recipe: RecipeName,
    out: Out = None,
    overrides: Set = None,
    metric: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Use this metric instead of the recipe's.", autocompletion=metric_names),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Score every unit of the recipe's model.

    A search starts from these scores, and computes them itself if the run directory has none.
    """
    if metric is not None and metric not in (names := list(metric_names(""))):
        raise UserError(f"--metric {metric}: expected {either(names)}{nearest(metric, names) or '.'}")
    settings = [*(overrides or []), *([f"scores.metric={metric}"] if metric else [])]
    with resumable(lambda _: NOTHING_NEW):
        loaded, run = open_recipe(recipe, out, settings)
    from pgprune_cli.run.layout import SCORES_FILE

    with resumable(lambda _: saved_by_init_scores(run)):
        from pgprune_cli.jobs.init_scores import init_scores

        scores = init_scores(loaded, run, progress=progress_of(quiet))
    result = {"run": str(run), "scores": str(run / SCORES_FILE), "metric": scores.metric}
    print_result(result, as_json, f"{run / SCORES_FILE}: {scores.metric} of {loaded.model}")
