"""pgprune doctor: check this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from pgprune_cli.cli.options import AsJson, Set, examples, recipe_names
from pgprune_cli.cli.tables import print_result
from pgprune_cli.errors import ExitCode, UserError

EXAMPLES = examples("doctor", "doctor llama2-7b-50")


def doctor(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE", help="Also check the model and the data of this recipe.", autocompletion=recipe_names
        ),
    ] = None,
    overrides: Set = None,
    as_json: AsJson = False,
) -> None:
    """Check that this machine can run a search.

    Checks Python, packages, devices, memory, disk and the hub, and says what to fix. The exit code
    is 1 if a search would fail.
    """
    from dataclasses import asdict

    from pgprune_cli.recipe.reader import find, load

    if overrides and recipe is None:
        raise UserError(f"--set {overrides[0]}: needs a recipe. Give one: pgprune doctor RECIPE --set {overrides[0]}")
    loaded = load(find(recipe), overrides or []) if recipe else None
    from pgprune_cli.jobs.doctor import doctor

    findings = doctor(loaded)
    rows = [asdict(finding) for finding in findings]
    print_result({"findings": rows}, as_json, "\n".join(finding.text() for finding in findings))
    if any(finding.fails for finding in findings):
        raise typer.Exit(ExitCode.FAILED)
