"""The disk that a recovery needs for what it has yet to write: checkpoints, cached predictions, the recovered model."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from pgprune_cli.errors import RunError
from pgprune_cli.jobs.machine import gigabytes
from pgprune_cli.jobs.recovery_request import Opened, Request, cache_of, holds_result
from pgprune_cli.model.loading import empty_prunable
from pgprune_cli.recover.checkpoints import MOST, STATE_BYTES, is_finished
from pgprune_cli.recover.student import trainable, trained_parameters
from pgprune_cli.recover.teacher_cache import missing_shards
from pgprune_cli.run.layout import CHECKPOINTS_FOLDER, training_checkpoint_folders, training_checkpoint_step
from pgprune_cli.storage.paths import expanded


class Need(NamedTuple):
    """Bytes in a folder, which need not exist. what: they are; option: chooses the folder."""

    folder: Path
    what: str
    option: str
    bytes: int


def check_disk(request: Request, opened: Opened) -> None:
    """Raise RunError if a disk has no room for what the recovery has yet to write. Loads no weights."""
    by_disk: dict[int, list[Need]] = defaultdict(list)
    for need in _needs(request, opened):
        by_disk[_existing(need.folder).stat().st_dev].append(need)
    for needs in by_disk.values():
        total, free = sum(need.bytes for need in needs), shutil.disk_usage(_existing(needs[0].folder)).free
        if total > free:
            parts = ", ".join(f"{need.what} {gigabytes(need.bytes)}" for need in needs)
            lora = "" if request.recipe.recover.train == "lora" else ", or set recover.train to lora"
            raise RunError(
                f"{needs[0].folder}: the recovery needs about {gigabytes(total)} of disk ({parts}), but only "
                f"{gigabytes(free)} are free. Make room, choose another disk with "
                f"{' or '.join(need.option for need in needs)}{lora}."
            )


def _needs(request: Request, opened: Opened) -> list[Need]:
    run, settings, out = request.run, request.recipe.recover, expanded(request.out).resolve()
    needs = [Need(out, "the recovered model", "--out", 0 if holds_result(out, run) else opened.model_bytes)]
    finished = [folder for folder in training_checkpoint_folders(run) if is_finished(folder)]
    if finished and training_checkpoint_step(finished[-1]) == opened.schedule.steps:
        return needs
    if settings.teacher == "cached":
        folder, key = cache_of(request, opened)
        missing = key.bytes_of([key.shards[index] for index in missing_shards(folder, key)])
        needs.insert(0, Need(folder.resolve(), "the dense model's predictions", "--teacher-cache", missing))
    student = trainable(empty_prunable(opened.student, "float32"), settings.train, settings.lora_rank)
    trained = sum(parameter.numel() for parameter in trained_parameters(student).values())
    there = sum(path.stat().st_size for path in (run / CHECKPOINTS_FOLDER).rglob("*") if path.is_file())
    missing = max(0, MOST * STATE_BYTES * trained - there)
    return [Need(run.resolve(), "checkpoints", "--run-dir", missing), *needs]


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())
