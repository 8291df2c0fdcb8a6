"""The recipe of a run: what a recipe leaves to the machine and the working directory is settled when a run begins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pgprune_cli.data.corpora import NAMED
from pgprune_cli.model.devices import fastest_dtype
from pgprune_cli.model.names import absolute_name
from pgprune_cli.recipe.reader import parse
from pgprune_cli.recipe.schema import Recipe, name_and_text
from pgprune_cli.recipe.strict_yaml import read_text
from pgprune_cli.run.layout import RECIPE_FILE, SCORES_FILE
from pgprune_cli.run.scores import Scores
from pgprune_cli.storage.paths import expanded


def settled(recipe: Recipe, run: Path | None = None) -> Recipe:
    """Return the recipe with absolute paths and the dtype of `with_dtype`. Raises UserError as that does.

    So a run can be used from any working directory.
    """
    return with_dtype(with_absolute_paths(recipe), run)


def with_dtype(recipe: Recipe, run: Path | None = None) -> Recipe:
    """Return the recipe with a dtype in place of `fastest`: that of the run, or of this machine if it is a new one.

    So a search that is resumed on another machine goes on in the same dtype. Raises UserError if the run's recipe is
    damaged, or if this machine does not have the recipe's device.
    """
    if recipe.dtype != "fastest":
        return recipe
    path = None if run is None else run / RECIPE_FILE
    if path is not None and path.exists():
        return replace(recipe, dtype=parse(read_text(path), f"{path}").dtype)
    return replace(recipe, dtype=fastest_dtype(recipe.device))


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Return the recipe with absolute paths of the model and the texts that are on this machine."""
    return replace(
        recipe,
        model=absolute_name(recipe.model),
        calibration=replace(recipe.calibration, corpus=absolute_text(recipe.calibration.corpus)),
        recover=replace(recipe.recover, corpus=recipe.recover.corpus and absolute_text(recipe.recover.corpus)),
        evaluation=replace(recipe.evaluation, corpora=tuple(map(_absolute_corpus, recipe.evaluation.corpora))),
    )


def with_metric_of_scores(recipe: Recipe, run: Path) -> Recipe:
    """Return the recipe with the metric of the run's scores, if it has any: a search uses the scores that it finds.

    Raises UserError if the scores are damaged.
    """
    if not (run / SCORES_FILE).exists():
        return recipe
    return replace(recipe, scores=replace(recipe.scores, metric=Scores.load(run).metric))


def _absolute_corpus(corpus: str) -> str:
    """Return an evaluation corpus with an absolute path, under the name that it had: `a.txt` as `a.txt=/data/a.txt`."""
    name, text = name_and_text(corpus)
    absolute = absolute_text(text)
    return corpus if absolute == text else absolute if "/" in name else f"{name}={absolute}"


def absolute_text(corpus: str) -> str:
    """Return a corpus with an absolute path. A column may follow the path of a file: `a.parquet:story`."""
    if corpus == "demo" or corpus in NAMED:
        return corpus
    if expanded(corpus).exists():
        return absolute_name(corpus)
    file, colon, column = corpus.rpartition(":")
    return absolute_name(file) + colon + column if expanded(file).is_file() else corpus
