"""pgprune doctor: check this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from pgprune_cli.cli.options import AsJson, Out, Set, examples, find_recipe, recipe_names
from pgprune_cli.cli.tables import print_result
from pgprune_cli.errors import ExitCode, UserError
from pgprune_cli.run.layout import runs_folder
from pgprune_cli.storage.paths import expanded

EXAMPLES = examples("doctor", "doctor llama2-7b-50")


def doctor(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE", help="Also check the model and the data of this recipe.", autocompletion=recipe_names
        ),
    ] = None,
    out: Out = None,
    overrides: Set = None,
    as_json: AsJson = False,
) -> None:
    """Check that this machine can run a search.

    Checks Python, packages, devices, memory, disk and the hub, and everything that a search of the
    recipe would be refused for. Says what to fix. The exit code is 1 if a search would fail.
    """
    from dataclasses import asdict

    from pgprune_cli.recipe.reader import load, name_of

    for option in [*(f"--set {override}" for override in overrides or []), *([f"--out {out}"] if out else [])]:
        if recipe is None:
            raise UserError(f"{option}: needs a recipe. Give one: pgprune doctor RECIPE {option}")
    path = find_recipe(recipe) if recipe else None
    loaded = load(path, overrides or []) if path else None
    run = expanded(out or runs_folder() / name_of(path)) if path else None
    from pgprune_cli.jobs.doctor import doctor

    findings = doctor(loaded, run)
    rows = [asdict(finding) for finding in findings]
    print_result({"findings": rows}, as_json, "\n".join(finding.text() for finding in findings))
    if any(finding.fails for finding in findings):
        raise typer.Exit(ExitCode.FAILED)
