"""pgprune recover: train a pruned model to predict what its dense model predicts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pgprune_cli.cli.export import Format
from pgprune_cli.cli.options import (
    AsJson,
    Quiet,
    Set,
    SkipCorruptCheckpoint,
    Tracker,
    examples,
    exported_names,
    find_recipe,
    progress_of,
    recipe_names,
)
from pgprune_cli.cli.saved import saved_by_recover
from pgprune_cli.cli.stopping import resumable
from pgprune_cli.cli.tables import print_recovery_estimate, print_result
from pgprune_cli.console.commands import command_line
from pgprune_cli.console.stderr import STDERR
from pgprune_cli.distributed import ranks_from_environment
from pgprune_cli.run.layout import runs_folder
from pgprune_cli.storage.paths import expanded

if TYPE_CHECKING:
    from pgprune_cli.recipe.schema import Recipe

EXAMPLES = examples(
    "recover models/smollm2-135m-50 --out models/recovered",
    "recover models/mine --out models/recovered --text more.txt --set recover.tokens=10_000_000",
    "recover models/llama2-7b-50 --out models/recovered --set recover.train=lora --set recover.teacher=cached",
)


def recover(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A directory that `pgprune export` or `recover` wrote.", autocompletion=exported_names
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="A new or empty directory, or a new .gguf file.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="RECIPE",
            help="Take the settings from this recipe.  [default: the one that the model was pruned with]",
            autocompletion=recipe_names,
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run-dir", metavar="DIR", help="The run directory.  [default: <name of PATH> in runs or $PGPRUNE_RUNS]"
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher", metavar="MODEL", help="The dense model.  [default: the one that MODEL was pruned from]"
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option("--text", metavar="CORPUS", help="Text to train on: a corpus name or a file."),
    ] = None,
    overrides: Set = None,
    format: Annotated[
        Format,
        typer.Option("--format", help="hf for transformers and vLLM, gguf for llama.cpp, mlx for mlx-lm."),
    ] = "hf",
    teacher_cache: Annotated[
        Path | None,
        typer.Option(
            "--teacher-cache",
            metavar="DIR",
            help="Directory of cached predictions that several recoveries can share.  "
            "[default: inside the run directory]",
        ),
    ] = None,
    tracker: Tracker = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Load nothing. Print the memory, disk, tokens and time it would take."),
    ] = False,
    skip_corrupt_checkpoint: SkipCorruptCheckpoint = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a pruned model to predict what its dense model predicts. Resumes automatically if it was interrupted.

    The model that did best on held-out text is exported with everything that the pruned one came with. Needs the extra
    `recovery`.
    """
    out, teacher_cache = expanded(out), teacher_cache and expanded(teacher_cache)
    run = expanded(run or runs_folder() / out.resolve().name)
    with resumable(lambda step: saved_by_recover(run, step, teacher_cache)):
        loaded = _open(model, recipe, text, overrides or [])
    if dry_run:
        from pgprune_cli.export.formats import refuse_other_suffix
        from pgprune_cli.jobs.estimate import estimate_recovery

        refuse_other_suffix(out, format)
        print_recovery_estimate(estimate_recovery(model, loaded, teacher, progress=progress_of(quiet)), as_json)
        return
    with resumable(lambda step: saved_by_recover(run, step, teacher_cache)):
        from pgprune_cli.jobs.recover import recover
        from pgprune_cli.jobs.recovery_request import Request

        request = Request(model, out, run, loaded, teacher, teacher_cache, format)
        record = recover(
            request, skip_corrupt_checkpoint=skip_corrupt_checkpoint, tracker=tracker, progress=progress_of(quiet)
        )
    if not ranks_from_environment().is_writer:
        return
    print_result(
        {"model": str(out), "run": str(run), **record},
        as_json,
        f"{out}: held-out divergence {record['loss_after']:.4f} nats per token after {record['tokens']:,} tokens "
        f"(before {record['loss_before']:.4f}), best at step {record['best_step']} of {record['steps']}",
    )
    if not quiet and out.is_dir():  # no command reads a pruned GGUF file
        print(f"next: {command_line('pgprune', 'eval', out, '--baseline', model)}", file=STDERR)


def _open(model: str, recipe: str | None, text: str | None, overrides: list[str]) -> Recipe:
    """Return the recipe that is given, or the one that the model was pruned with."""
    import json

    options = [] if text is None else [f"recover.corpus={json.dumps(text, ensure_ascii=False)}"]
    if recipe is not None:
        from pgprune_cli.recipe.reader import load

        return load(find_recipe(recipe), [*options, *overrides])
    from pgprune_cli.jobs.recovery_request import recipe_of

    return recipe_of(model, [*options, *overrides])
