"""Arguments and options that several commands share, their shell completion, and the opening of recipes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pgprune_cli.errors import UserError
from pgprune_cli.run.layout import DECISION_RECORD, is_recovery_run, run_directories, runs_folder
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


def is_model(name: str) -> bool:
    """Return whether a name stands for a model and not for a recipe: recipes come first, so `demo` is a recipe."""
    from pgprune_cli.model.names import is_hub_name
    from pgprune_cli.model.source import find_local
    from pgprune_cli.recipe.reader import find

    try:
        find(name)
        return False
    except UserError:
        if name.lower().endswith((".yaml", ".yml")):
            return False
    try:
        find_local(name, weights=False)
    except UserError:
        return expanded(name).exists() or is_hub_name(name)
    return True


def open_recipe(name: str, out: Path | None, overrides: list[str], runs: Path | None = None) -> tuple[Recipe, Path]:
    """Load a recipe. Return it with its run directory: `out`, or one named like the recipe in the folder `runs`.

    Raises UserError, also for a local model that does not exist.
    """
    from pgprune_cli.model.source import find_local
    from pgprune_cli.recipe.reader import find, load, name_of

    path = find(name)
    recipe, run = load(path, overrides), out or (runs or runs_folder()) / name_of(path)
    if not (run / DECISION_RECORD).exists():
        find_local(recipe.model, weights=False)  # before seconds of imports
    return recipe, run
