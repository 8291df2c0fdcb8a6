"""Arguments and options that several commands share, their shell completion, and the opening of recipes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pgprune_cli.console.commands import command_line
from pgprune_cli.errors import UserError
from pgprune_cli.run.layout import (
    DECISION_RECORD,
    RECIPE_FILE,
    is_recovery_run,
    is_run,
    run_directories,
    runs_folder,
)
from pgprune_cli.storage.paths import expanded

if TYPE_CHECKING:
    from pgprune_cli.console.progress import Progress
    from pgprune_cli.recipe.schema import Recipe


def examples(*lines: str) -> str:
    """Return the examples that end a help page, one command per line (\\b keeps the parser from joining the lines)."""
    return "\b\nExamples:\n" + "\n".join(f"  pgprune {line}" for line in lines)


def recipe_names(incomplete: str) -> Iterator[str]:
    """Complete the names of shipped recipes, and recipe files."""
    from pgprune_cli.recipe.reader import name_of, shipped

    names = [name_of(path) for path in shipped()]
    files = [str(path) for path in Path(incomplete or ".").parent.glob("*.yaml")]
    return (name for name in [*names, *files] if name.startswith(incomplete))


def gpu_names(incomplete: str) -> Iterator[str]:
    """Complete the names of GPUs that a search can be estimated for."""
    from pgprune_cli.estimate.machines import GPUS

    return (name for name in GPUS if name.startswith(incomplete))


def run_names(incomplete: str) -> Iterator[str]:
    """Complete the runs in the runs folder."""
    return (str(run) for run in run_directories(runs_folder()) if str(run).startswith(incomplete))


def search_names(incomplete: str) -> Iterator[str]:
    """Complete the runs of searches in the runs folder."""
    return (name for name in run_names(incomplete) if not is_recovery_run(Path(name)))


def model_names(incomplete: str) -> Iterator[str]:
    """Complete what `eval` measures: demo, model directories in `models`, and runs."""
    models = (str(path.parent) for path in sorted(Path("models").glob("*/config.json")))
    return (name for name in ["demo", *models, *search_names("")] if name.startswith(incomplete))


def exported_names(incomplete: str) -> Iterator[str]:
    """Complete the exported models in `models`."""
    models = (str(path.parent) for path in sorted(Path("models").glob(f"*/{DECISION_RECORD}")))
    return (name for name in models if name.startswith(incomplete))


def metric_names(incomplete: str) -> Iterator[str]:
    """Complete the names of the metrics."""
    from typing import get_args

    from pgprune_cli.recipe.schema import MetricName

    return (name for name in get_args(MetricName) if name.startswith(incomplete))


RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.", autocompletion=recipe_names
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="The run directory.  [default: <recipe> in runs or $PGPRUNE_RUNS]"),
]
BaseModel = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="Where the base model is now.  [default: where the search found it]"),
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe. Repeatable.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Do not report progress on stderr.")]
MaxWindows = Annotated[
    int | None,
    typer.Option(
        "--max-windows",
        min=1,
        metavar="N",
        help="Evaluate at most N windows of the shortest --seqlen. Other lengths use the same number of tokens.",
    ),
]
Sparsity = Annotated[
    float,
    typer.Option("--sparsity", metavar="FRACTION", help="Fraction of the prunable parameters to remove, such as 0.3."),
]
Calibration = Annotated[
    str | None,
    typer.Option("--calibration", metavar="CORPUS", help="Text to search on: a corpus name or a file.  [default: c4]"),
]
Tracker = Annotated[
    Literal["tensorboard", "trackio", "wandb"] | None,
    typer.Option("--tracker", help="Log every step to a tracker. An extra of the same name installs it."),
]
SkipCorruptCheckpoint = Annotated[
    bool,
    typer.Option(
        "--skip-corrupt-checkpoint", help="If the newest checkpoint is damaged, resume from the one before it."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]


def progress_of(quiet: bool) -> Progress:
    """Return what reports progress on stderr, or a silent one under `--quiet`."""
    from pgprune_cli.console.progress import SILENT, StderrProgress

    return SILENT if quiet else StderrProgress()


def find_recipe(name: str) -> Path:
    """Return the path of a recipe. Raises UserError, which says what to do with a run or a model in its place."""
    from pgprune_cli.model.source import find_local
    from pgprune_cli.recipe.reader import find

    try:
        return find(name)
    except UserError:
        path = expanded(name)
        if not name.strip() or path.suffix.lower() in (".yaml", ".yml") or not path.exists():
            raise
    if is_recovery_run(path):
        raise UserError(f"{name}: the run of a recovery, not a recipe.")
    if is_run(path):
        again = command_line("pgprune", "search", path / RECIPE_FILE, "--out", path)
        advice = f" Resume its search with: {again}" if (path / RECIPE_FILE).exists() else ""
        raise UserError(f"{name}: a run, not a recipe.{advice}")
    if path.is_file() and path.suffix != ".gguf":
        raise UserError(f"{name}: not a recipe, whose name ends in .yaml, and not a model either.")
    find_local(name, weights=False)
    new = command_line("pgprune", "recipes", "new", name)
    raise UserError(f"{name}: a model, not a recipe. Write one first: {new} > mine.yaml")


def check_options(sparsity: float | None, calibration: str | None) -> None:
    """Raise UserError for a --sparsity that is no fraction, or a --calibration that names no text."""
    from pgprune_cli.data.corpora import check_corpus
    from pgprune_cli.recipe.schema import Range

    if sparsity is not None and (problem := Range(0, 1)(sparsity)):
        raise UserError(f"--sparsity {sparsity:g}: {problem}.")
    if calibration is not None and not calibration.strip():
        raise UserError("--calibration: expected a corpus name or a file, got nothing.")
    if calibration is not None:
        check_corpus(calibration)


def is_model(name: str, with_sparsity: bool) -> bool:
    """Return whether a name stands for a model and not for a recipe: recipes come first, so `demo` is a recipe.

    with_sparsity: whether --sparsity is given, so that a path that does not exist is a model's.
    """
    from pgprune_cli.model.names import is_hub_name
    from pgprune_cli.model.source import find_local
    from pgprune_cli.recipe.reader import find

    path = expanded(name)
    try:
        find(name)
        return False
    except UserError:
        if not name.strip() or path.suffix.lower() in (".yaml", ".yml") or (path.exists() and is_run(path)):
            return False
    try:
        find_local(name, weights=False)
    except UserError:
        is_path = "/" in name or path.suffix == ".gguf" or path.exists()
        return is_hub_name(name) or (with_sparsity and is_path)
    return True


def open_recipe(name: str, out: Path | None, overrides: list[str], runs: Path | None = None) -> tuple[Recipe, Path]:
    """Load a recipe. Return it with its run directory: `out`, or one named like the recipe in the folder `runs`.

    Raises UserError, also for a local model that does not exist.
    """
    from pgprune_cli.model.source import find_local
    from pgprune_cli.recipe.reader import load, name_of

    path = find_recipe(name)
    recipe, run = load(path, overrides), expanded(out or (runs or runs_folder()) / name_of(path))
    if not (run / DECISION_RECORD).exists():
        find_local(recipe.model, weights=False)  # before seconds of imports
    return recipe, run
