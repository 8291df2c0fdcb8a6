"""The layout of a run directory: where runs are, and the name of every file in one.

No other module spells these names. It imports nothing heavy, so that shell completion can use it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pgprune_cli.console.commands import command_line
from pgprune_cli.errors import UserError
from pgprune_cli.storage.paths import expanded

RUNS_VARIABLE = "PGPRUNE_RUNS"

# Every run
RECIPE_FILE = "recipe.yaml"  # the resolved recipe
PROVENANCE_FILE = "provenance.jsonl"  # the commands that wrote here, with versions and machine
LOCK_FILE = ".lock"  # held while a process works in the directory

# Scores, and what the search measures before its first step
SCORES_FILE = "scores.safetensors"
COSTS_FILE = "costs.json"  # latency per unit, for budget.measure: latency
WIDTHS_FOLDER = "widths"  # the width table, one file per layer, until the search is finished
_WIDTHS_FILE = "layer-{:05d}.safetensors"

# The search
METRICS_FILE = "metrics.jsonl"  # the history, one row per step
CHECKPOINTS_FOLDER = "checkpoints"  # the last two checkpoints, one folder each
_CHECKPOINT = "step-{:08d}"
CHECKPOINT_TENSORS = "state.safetensors"
CHECKPOINT_RECORD = "state.json"
TENSORBOARD_FOLDER = "tensorboard"

# The decision
DECISION_MASKS = "decision.safetensors"
DECISION_RECORD = "decision.json"
RECOVERY_RECORD = "recovery.json"  # how a model was trained after pruning: in its directory and in the finished run
REPAIR_FILE = "repair.safetensors"  # refitted weights

# A recovery has a run directory of its own, with a recipe, a provenance and checkpoints as that of a search
TRAINING_RECORD = "training.json"  # what is trained: the student, its dense model and the text, with fingerprints
TRAINING_HISTORY = "training.jsonl"  # the history, one row per logged step
WRITING_RECORD = "writing.json"  # where the recovered model is being written, and what recovery.json will hold
TEACHER_FOLDER = "teacher"  # the cached predictions of the dense model, which recoveries can share elsewhere
TEACHER_RECORD = "teacher.json"  # of which model, on which text, and how much they cover
_TEACHER_SHARD = "predictions-{:05d}.safetensors"
_TRAINING_CHECKPOINT = "checkpoint-{}"

# After the search
EVALUATION_FILE = "evaluation.json"  # by `pgprune eval RUN`
REPORT_FILE = "report.html"  # by `pgprune report`

# A comparison: these in its directory, and one file in each of its runs
COMPARISON_RECORD = "comparison.json"
COMPARISON_TABLE = "comparison.md"
SCORES_FOLDER = "scores"  # the scores that its searches share
TABLES_FOLDER = "tables"  # the width tables that its searches share, until all are finished
MEASURED_FILE = "measured.json"  # the perplexities of one run


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint at `step`."""
    return run / CHECKPOINTS_FOLDER / _CHECKPOINT.format(step)


def checkpoint_folders(run: Path) -> list[Path]:
    """Return the folders of all checkpoints on disk, oldest first."""
    prefix = _CHECKPOINT.partition("{")[0]
    return sorted((run / CHECKPOINTS_FOLDER).glob(f"{prefix}*"))


def checkpoint_step(folder: Path) -> int | None:
    """Return the step of a checkpoint folder, or None if its name has no step."""
    return _step(folder, _CHECKPOINT.partition("{")[0])


def training_checkpoint_folder(run: Path, step: int) -> Path:
    """Return the folder of a recovery's checkpoint at `step`, which transformers' Trainer names."""
    return run / CHECKPOINTS_FOLDER / _TRAINING_CHECKPOINT.format(step)


def training_checkpoint_folders(run: Path) -> list[Path]:
    """Return the folders of all checkpoints of a recovery on disk, oldest first."""
    folders = list((run / CHECKPOINTS_FOLDER).glob(_TRAINING_CHECKPOINT.format("*")))
    steps = {folder: training_checkpoint_step(folder) for folder in folders}
    return sorted((folder for folder in folders if steps[folder] is not None), key=lambda folder: steps[folder] or 0)


def training_checkpoint_step(folder: Path) -> int | None:
    """Return the step of a recovery's checkpoint folder, or None if its name has no step."""
    return _step(folder, _TRAINING_CHECKPOINT.partition("{")[0])


def _step(folder: Path, prefix: str) -> int | None:
    step = folder.name.removeprefix(prefix)
    return int(step) if step.isdecimal() else None


def widths_file(run: Path, layer: int) -> Path:
    """Return the file of one layer of the width table."""
    return run / WIDTHS_FOLDER / _WIDTHS_FILE.format(layer)


def teacher_shard(folder: Path, shard: int) -> Path:
    """Return the file of one shard of a dense model's predictions."""
    return folder / _TEACHER_SHARD.format(shard)


def has_teacher_shards(folder: Path) -> bool:
    """Return whether a folder, or one in it, holds predictions of a dense model."""
    prefix, _, suffix = _TEACHER_SHARD.partition("{:05d}")
    return next(folder.rglob(f"{prefix}*{suffix}"), None) is not None


def widths_files(run: Path) -> list[Path]:
    """Return the files of all layers of the width table that are on disk."""
    prefix, _, suffix = _WIDTHS_FILE.partition("{:05d}")
    return sorted((run / WIDTHS_FOLDER).glob(f"{prefix}*{suffix}"))


def runs_folder() -> Path:
    """Return the default parent of run directories: $PGPRUNE_RUNS, or `runs`."""
    return expanded(os.environ.get(RUNS_VARIABLE) or "runs")


def is_run(folder: Path) -> bool:
    """Return whether a directory is a run, finished or not. An exported model has a decision too, but is not a run."""
    has_run_file = any((folder / name).exists() for name in (RECIPE_FILE, SCORES_FILE))
    return has_run_file and not (folder / "config.json").exists()


def is_recovery_run(folder: Path) -> bool:
    """Return whether a run directory belongs to a recovery, finished or not."""
    return (folder / TRAINING_RECORD).exists() and is_run(folder)


def refuse_other_content(folder: Path, option: str = "--out") -> None:
    """Raise UserError if a directory cannot become a run, because it holds a model or other runs.

    option: chooses the directory on the command line.
    """
    if (folder / "config.json").exists():
        kind = "an exported model" if (folder / DECISION_RECORD).exists() else "a model"
        raise UserError(f"{folder}: {kind}, not a run. Choose another directory with {option}.")
    if folder.is_dir() and not is_run(folder) and any(map(is_run, folder.iterdir())):
        raise UserError(f"{folder}: holds other runs. Choose a new directory, such as {option} {folder / 'NAME'}.")


def run_directories(folder: Path) -> Iterator[Path]:
    """Yield every run in a folder and below it, sorted by name. Runs are not nested.

    A folder that several links lead to is entered once. Folders below that cannot be read are left out.
    """
    return _runs_in(folder, set())


def _runs_in(folder: Path, entered: set[str]) -> Iterator[Path]:
    """Yield every run in a folder that is not in `entered`, and add the folders that are entered to it."""
    if is_run(folder):
        yield folder
        return
    place = os.path.realpath(folder)
    if place in entered or not folder.is_dir():
        return
    entered.add(place)
    for subfolder in sorted(path for path in folder.iterdir() if path.is_dir()):
        if not subfolder.name.startswith("."):
            with suppress(OSError):
                yield from _runs_in(subfolder, entered)


def refuse_unfinished(run: Path) -> None:
    """Raise UserError, with the command that helps, if `run` is not a run or has no decision yet."""
    if all((run / name).exists() for name in (DECISION_MASKS, DECISION_RECORD)):
        return
    if is_recovery_run(run):
        raise UserError(f"{run}: holds a recovery, not a search. Give the model that it wrote, or the run of a search.")
    if (run / RECIPE_FILE).exists():
        again = command_line("pgprune", "search", run / RECIPE_FILE, "--out", run)
        raise UserError(f"{run}: the search is not finished, so there is no decision yet. Resume it with: {again}")
    if is_run(run):
        search = command_line("pgprune", "search", "RECIPE", "--out", run)
        raise UserError(f"{run}: holds scores but no decision. Run the search with: {search}")
    refuse_no_run(run)


def refuse_no_run(run: Path) -> None:
    """Raise UserError if `run` is not a run directory, finished or not."""
    if not is_run(run):
        problem = "is not a run directory" if run.is_dir() else "no such run directory"
        raise UserError(f"{run}: {problem}. `pgprune runs` lists the existing runs.")
