"""pgprune search: find the units to keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pgprune_cli.cli.options import (
    AsJson,
    Calibration,
    Out,
    Quiet,
    Set,
    SkipCorruptCheckpoint,
    Tracker,
    check_options,
    examples,
    gpu_names,
    is_model,
    open_recipe,
    progress_of,
    recipe_names,
)
from pgprune_cli.cli.saved import NOTHING_NEW, saved_by_search
from pgprune_cli.cli.stopping import resumable
from pgprune_cli.cli.tables import print_estimate, print_result
from pgprune_cli.console.commands import command_line
from pgprune_cli.console.stderr import STDERR
from pgprune_cli.distributed import ranks_from_environment
from pgprune_cli.errors import UserError
from pgprune_cli.run.evaluation import with_bos
from pgprune_cli.run.layout import RECIPE_FILE, runs_folder
from pgprune_cli.storage.paths import expanded

if TYPE_CHECKING:
    from pgprune_cli.recipe.schema import Recipe

EXAMPLES = examples(
    "search demo",
    "search HuggingFaceTB/SmolLM2-135M-Instruct --sparsity 0.3",
    "search mine.yaml --out runs/mine",
    "search llama2-7b-50 --set model=/data/my-llama --set budget.sparsity=0.4",
)


def search(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|MODEL",
            help="A recipe file, the name of a shipped recipe, or a model together with --sparsity.",
            autocompletion=recipe_names,
        ),
    ],
    out: Out = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            "--sparsity",
            metavar="FRACTION",
            help="Fraction to remove of what the budget counts, such as 0.3. Required for a MODEL.",
        ),
    ] = None,
    calibration: Calibration = None,
    overrides: Set = None,
    tracker: Tracker = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Load nothing. Print the memory, forward passes and time it would take."),
    ] = False,
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            metavar="GPU",
            help="With --dry-run, estimate for this GPU, such as h100-80gb, instead of this machine.",
            autocompletion=gpu_names,
        ),
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", metavar="N", min=1, help="With --on, the number of GPUs.")] = 1,
    skip_corrupt_checkpoint: SkipCorruptCheckpoint = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Search for the units to keep. Resumes automatically if a previous run was interrupted.

    A MODEL (a hub name, a directory or a GGUF file) needs no recipe: the settings are chosen as `recipes new` chooses
    them, and the run directory gets a copy of the resolved recipe.
    """
    if on is not None and not dry_run:
        raise UserError("--on: only works with --dry-run. Add it.")
    if gpus > 1 and on is None:
        raise UserError("--gpus: needs --on. On this machine, the recipe's `device` chooses the GPUs.")
    with resumable(lambda _: NOTHING_NEW):
        loaded, run = _open(recipe, out, overrides or [], sparsity, calibration)
    if dry_run:
        from pgprune_cli.jobs.estimate import estimate

        print_estimate(estimate(loaded, on=on, gpus=gpus, progress=progress_of(quiet)), as_json)
        return
    from pgprune_cli.run.layout import DECISION_MASKS

    with resumable(lambda step: saved_by_search(run, loaded.search.steps, step)):
        from pgprune_cli.jobs.search import search

        decision = search(
            loaded, run, skip_corrupt_checkpoint=skip_corrupt_checkpoint, tracker=tracker, progress=progress_of(quiet)
        )
    if not ranks_from_environment().is_writer:
        return
    result = {
        "run": str(run),
        "decision": str(run / DECISION_MASKS),
        "sparsity": decision.sparsity,
        "steps": decision.steps,
        "best_step": decision.best_step,
        "forward_passes": decision.forward_passes,
        "heldout_loss": decision.heldout_loss,
        "dense_loss": decision.dense_loss,
        "bos": decision.bos,
        "phases": decision.phases,
    }
    loss = "not finite" if decision.heldout_loss is None else f"{decision.heldout_loss:.4f} nats per token"
    best = "" if decision.best_step is None else f", best at step {decision.best_step}"
    dense = "" if decision.dense_loss is None else f" (dense model {decision.dense_loss:.4f})"
    print_result(
        result,
        as_json,
        f"{run / DECISION_MASKS}: sparsity {decision.sparsity:.4f} after {decision.steps} steps{best}, "
        f"{decision.forward_passes} forward passes; held-out loss {loss}{dense}{with_bos(decision.bos)}",
    )
    if decision.phases and not quiet:
        print(f"seconds: {decision.seconds_by_phase()}", file=STDERR)
    if not quiet:
        print(f"next: {command_line('pgprune', 'export', run)}, or {command_line('pgprune', 'eval', run)}", file=STDERR)


def _open(
    name: str, out: Path | None, overrides: list[str], sparsity: float | None, calibration: str | None
) -> tuple[Recipe, Path]:
    """Return the recipe of a name and its run directory; for a model, its run's recipe or a new one."""
    check_options(sparsity, calibration)
    values = {"budget.sparsity": sparsity, "calibration.corpus": calibration}
    options = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items() if value is not None]
    if not is_model(name, with_sparsity=sparsity is not None):
        return open_recipe(name, out, [*options, *overrides])
    if sparsity is None:
        example = command_line("pgprune", "search", name, "--sparsity", 0.3)
        raise UserError(f"{name}: a model, not a recipe. Say how much to remove, for example: {example}")
    from pgprune_cli.model.source import find_local

    find_local(name, weights=False)  # a wrong name is refused before seconds of imports
    from pgprune_cli.jobs.new_recipe import new_recipe, run_name

    run = expanded(out or runs_folder() / run_name(name, sparsity))
    if (run / RECIPE_FILE).exists():  # resumed with the values chosen then, whatever this machine has free now
        from pgprune_cli.model.names import absolute_name
        from pgprune_cli.recipe.reader import load

        # Models of other owners or folders have the same run name: the search compares this one with the run's.
        model = f"model={json.dumps(absolute_name(name), ensure_ascii=False)}"
        return load(run / RECIPE_FILE, [model, *options, *overrides]), run
    loaded, _ = new_recipe(name, sparsity=sparsity, calibration=calibration, overrides=overrides)
    return loaded, run
