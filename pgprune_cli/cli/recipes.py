"""pgprune recipes: list, show and copy the recipes that ship, and write a new one for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pgprune_cli.cli.options import (
    AsJson,
    Calibration,
    RecipeName,
    Set,
    Sparsity,
    check_options,
    examples,
    find_recipe,
    model_names,
)
from pgprune_cli.cli.tables import print_result
from pgprune_cli.console.commands import command_line

recipes_app = typer.Typer(
    invoke_without_command=True,
    rich_markup_mode=None,
    epilog=examples(
        "recipes",
        "recipes new HuggingFaceTB/SmolLM2-135M-Instruct --sparsity 0.3 > mine.yaml",
        "recipes show llama2-7b-50",
        "recipes copy llama2-7b-50 mine.yaml",
    ),
)


@recipes_app.callback()
def recipes(context: typer.Context, as_json: AsJson = False) -> None:
    """List, show and copy recipes, or write a new one.

    Without a command, lists the recipes that ship with pgprune.
    """
    if context.invoked_subcommand is not None:
        return
    from pgprune_cli.recipe.listing import listing
    from pgprune_cli.recipe.reader import name_of, shipped, summary

    print_result({"recipes": {name_of(path): summary(path) for path in shipped()}}, as_json, listing())


@recipes_app.command(
    epilog=examples(
        "recipes new HuggingFaceTB/SmolLM2-135M-Instruct > mine.yaml",
        "recipes new /data/my-llama --sparsity 0.5 --calibration my-text.jsonl > mine.yaml",
    )
)
def new(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A hub name, a directory, a GGUF file, or demo.", autocompletion=model_names
        ),
    ],
    sparsity: Sparsity = 0.3,
    calibration: Calibration = None,
    as_json: AsJson = False,
) -> None:
    """Print a new recipe for a model. Its values suit the model's size and this machine's devices.

    Only the model's config is read. Redirect the output to a file and edit it.
    """
    from pgprune_cli.model.source import find_local

    check_options(sparsity, calibration)
    find_local(model, weights=False)  # a wrong name is refused before seconds of imports
    from pgprune_cli.jobs.new_recipe import new_recipe

    _, text = new_recipe(model, sparsity=sparsity, calibration=calibration)
    print_result({"recipe": text}, as_json, text.rstrip())


@recipes_app.command(epilog=examples("recipes show llama2-7b-50", "recipes show mine.yaml --set budget.sparsity=0.4"))
def show(recipe: RecipeName, overrides: Set = None, as_json: AsJson = False) -> None:
    """Print a recipe with every default filled in.

    Merges in the base recipe that it extends, as a search does.
    """
    from dataclasses import asdict

    from pgprune_cli.recipe.reader import load
    from pgprune_cli.recipe.text import annotated

    path = find_recipe(recipe)
    loaded = load(path, overrides or [])
    print_result(asdict(loaded), as_json, annotated(loaded, path).rstrip())


@recipes_app.command(epilog=examples("recipes copy llama2-7b-50", "recipes copy paper/llama2-7b-50 mine.yaml"))
def copy(
    recipe: RecipeName,
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="The new file.  [default: <recipe>.yaml here]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Copy a recipe, with every key, into a new file to edit."""
    from pgprune_cli.recipe.text import copy

    find_recipe(recipe)  # refuses a run or a model
    written = copy(recipe, file)
    print_result(
        {"recipe": str(written)}, as_json, f"{written}: edit it, then {command_line('pgprune', 'search', written)}"
    )
