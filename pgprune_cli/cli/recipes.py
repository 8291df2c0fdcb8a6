"""pgprune recipes: the recipes that ship, listed, shown and handed out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pgprune_cli.cli.options import AsJson, RecipeName, Set, examples
from pgprune_cli.cli.tables import print_result

recipes_app = typer.Typer(
    invoke_without_command=True,
    rich_markup_mode=None,
    epilog=examples("recipes", "recipes show llama2-7b-50", "recipes copy llama2-7b-50 mine.yaml"),
)


@recipes_app.callback()
def recipes(context: typer.Context, as_json: AsJson = False) -> None:
    """List the recipes that ship; show one, or copy one to edit."""
    if context.invoked_subcommand is not None:
        return
    from pgprune_cli.recipe.reader import name_of, shipped, summary

    listed = {name_of(path): summary(path) for path in shipped()}
    width = max(map(len, listed))
    print_result({"recipes": listed}, as_json, "\n".join(f"{name:<{width}}  {text}" for name, text in listed.items()))


@recipes_app.command(epilog=examples("recipes show llama2-7b-50", "recipes show mine.yaml --set budget.sparsity=0.4"))
def show(recipe: RecipeName, overrides: Set = None, as_json: AsJson = False) -> None:
    """Print a recipe as a search would read it: what it extends and every default filled in."""
    from dataclasses import asdict

    from pgprune_cli.recipe.reader import find, load
    from pgprune_cli.recipe.text import annotated

    loaded = load(find(recipe), overrides or [])
    print_result(asdict(loaded), as_json, annotated(loaded).rstrip())


@recipes_app.command(epilog=examples("recipes copy llama2-7b-50", "recipes copy paper/llama2-7b-50 mine.yaml"))
def copy(
    recipe: RecipeName,
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="The new file.  [default: <recipe>.yaml here]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a recipe, every key of it, into a new file to edit."""
    from pgprune_cli.recipe.text import copy

    written = copy(recipe, file)
    print_result({"recipe": str(written)}, as_json, f"{written}: edit it, then pgprune search {written}")
