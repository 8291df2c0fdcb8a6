"""recover: train an exported model to predict what its dense model predicts, and export it again."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pgprune_cli.console.progress import SILENT, Progress
from pgprune_cli.distributed import ALONE, Ranks, join, ranks_from_environment
from pgprune_cli.export.trained import plan_again
from pgprune_cli.jobs.recovery_disk import check_disk
from pgprune_cli.jobs.recovery_request import (
    Opened,
    Request,
    begin,
    cache_of,
    check,
    device_of,
    finished,
    holds_result,
    open_request,
)
from pgprune_cli.model.loading import load_prunable, read_config, stored_dtype
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.recipe.reader import dump
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.recover.checkpoints import TrainingCheckpoint, best, latest, remove_all
from pgprune_cli.recover.heldout import heldout_divergence, take_rounded
from pgprune_cli.recover.schedule import Schedule
from pgprune_cli.recover.student import loaded_dtype, trainable, trained_tensors
from pgprune_cli.recover.teacher import LiveTeacher, Teacher, load_teacher
from pgprune_cli.recover.teacher_writing import cached_teacher
from pgprune_cli.recover.trainer import Training
from pgprune_cli.recover.training import load_trained, train, training_arguments
from pgprune_cli.run.interruption import Interrupted, stop_signals
from pgprune_cli.run.layout import CHECKPOINTS_FOLDER, RECOVERY_RECORD, TRAINING_HISTORY, WRITING_RECORD
from pgprune_cli.run.lock import locked
from pgprune_cli.run.recovery import RecoveryRecord, read_recoveries
from pgprune_cli.run.settled import settled
from pgprune_cli.run.trackers import TrackerName, tracking
from pgprune_cli.run.training_history import TrainingRow, read_training_history
from pgprune_cli.storage.paths import expanded
from pgprune_cli.storage.records import read_record, write_record
from pgprune_cli.storage.rows import cut_back


def recover(
    request: Request,
    *,
    skip_corrupt_checkpoint: bool = False,
    tracker: TrackerName | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Train the model as the recipe says, or resume its training, and write the best weights to `request.out`.

    Under torchrun all processes call this alike, and only the writer among them writes models and history.

    Returns the record of the recovery (`RecoveryRecord`), also if it was finished before.

    Raises:
        UserError: the run directory belongs to something else, is damaged or in use; the teacher or the text does not
            fit the student; `out` exists.
        RunError: the loss is not finite, the disk is too full, or another process has died.
        Interrupted: a signal stopped the training; its state is saved.
    """
    request = replace(request, recipe=settled(request.recipe))
    if (request.run / RECOVERY_RECORD).exists():
        record = finished(request)
        if ranks_from_environment().is_writer:
            progress.say(f"{request.run}: is finished already")
            if (request.run / CHECKPOINTS_FOLDER).exists():  # a kill came while they were removed
                with locked(request.run):
                    _clean_up(request.run)
        return record
    check(request, tracker)
    backend = "cpu:gloo,cuda:nccl" if device_of(request.recipe).type == "cuda" else "gloo"
    with join(backend, common=(Interrupted,)) as ranks, ExitStack() as until_finished:
        shown = progress if ranks.is_writer else SILENT
        if ranks.is_writer:
            until_finished.enter_context(locked(request.run))
        with ranks.run_writer_first():  # one process downloads and tokenises, the others find it done
            opened = open_request(request, ranks, shown)
            if ranks.is_writer:
                check_disk(request, opened)
                begin(request, opened)
        if not ranks.max(holds_result(expanded(request.out), request.run)):
            _train(request, opened, ranks, shown, tracker, skip_corrupt_checkpoint)
        gc.collect()  # the Trainer and its parts refer to each other, and hold the models
        with ranks.run_writer_first():
            if ranks.is_writer:
                _write(request, opened, shown)
        return read_record(request.run / RECOVERY_RECORD)


# --- the training


def _train(
    request: Request,
    opened: Opened,
    ranks: Ranks,
    progress: Progress,
    tracker: TrackerName | None,
    skip_corrupt_checkpoint: bool,
) -> None:
    """Do the steps that are left."""
    recipe, run, settings = request.recipe, request.run, request.recipe.recover
    device = device_of(recipe)
    with ranks.run_writer_first():  # the writer removes checkpoints that are not whole
        resumed = latest(run, skip_corrupt_checkpoint and ranks.is_writer)
        if ranks.is_writer:
            cut_back(run / TRAINING_HISTORY, None if resumed is None else resumed.history)
    if resumed is not None and resumed.step == opened.schedule.steps:
        return
    cached = None
    if settings.teacher == "cached":
        cached = _cached_teacher(request, opened, ranks, progress)
    with progress.working(f"loading {request.model}"):
        model, student = _load_student(opened, recipe, resumed)
    arguments = training_arguments(run, settings, recipe.seed, opened.schedule, on_cpu=device.type == "cpu")
    layers = list(model.layers) if settings.hidden else []
    teacher: Teacher = cached or _live_teacher(request, opened, progress, beside_student=True)
    log = tracking(tracker if ranks.is_writer else None, run, asdict(recipe), 0 if resumed is None else resumed.step)
    if resumed is not None:
        progress.say(f"resuming from step {resumed.step} of {opened.schedule.steps}")
    with log as track:

        def report(row: TrainingRow) -> None:
            track(row)
            _show(row, opened.schedule, progress)

        training = Training(
            run=run,
            settings=settings,
            seed=recipe.seed,
            schedule=opened.schedule,
            text=opened.text,
            teacher=teacher,
            layers=layers,
            resumed=resumed,
            report=report,
            ranks=ranks,
            bfloat16=opened.record.products == "bfloat16",
        )
        train(student, arguments, training)


def _load_student(
    opened: Opened, recipe: Recipe, checkpoint: TrainingCheckpoint | None
) -> tuple[PrunableModel, nn.Module]:
    """Return the model, and what is trained of it, with the weights of a checkpoint if there is one."""
    from transformers import set_seed

    settings = recipe.recover
    dtype = loaded_dtype(settings.train, bfloat16=opened.record.products == "bfloat16")
    model = load_prunable(opened.student, dtype, "cpu")
    set_seed(recipe.seed)  # adapters begin with random weights
    student = trainable(model, settings.train, settings.lora_rank)
    if checkpoint is not None:
        load_trained(student, checkpoint)
    return model, student


def _live_teacher(request: Request, opened: Opened, progress: Progress, *, beside_student: bool) -> LiveTeacher:
    """Load the dense model onto the devices of this process: one GPU, or more if its weights need them.

    beside_student: leave the first of several GPUs to the training.
    """
    settings = request.recipe.recover
    with progress.working(f"loading {opened.teacher.name}"):
        model = load_teacher(opened.teacher, request.recipe.device, beside_student=beside_student)
    return LiveTeacher(model, settings.top_k, settings.temperature, opened.streams)


def _cached_teacher(request: Request, opened: Opened, ranks: Ranks, progress: Progress) -> Teacher:
    """Return the dense model's predictions on disk, after writing what is missing of them."""
    folder, key = cache_of(request, opened)
    with stop_signals(ranks) as stop:
        teacher = cached_teacher(
            folder,
            key,
            opened.text,
            lambda: _live_teacher(request, opened, progress, beside_student=False),
            batch=request.recipe.recover.batch,
            ranks=ranks,
            stop=stop,
            progress=progress,
        )
        if stop_signal := ranks.max(stop[0] if stop else 0):  # it came while the files were checked
            raise Interrupted(stop_signal, 0)
    return teacher


def _show(row: TrainingRow, schedule: Schedule, progress: Progress) -> None:
    """Print a line for a row with an evaluation."""
    if row.heldout_divergence is None:
        return
    loss = "" if row.loss is None else f" loss {row.loss:.3f}"
    speed = "" if row.tokens_per_second is None else f" {row.tokens_per_second:,.0f} tok/s"
    progress.say(
        f"step {row.step}/{schedule.steps}{loss} held-out {row.heldout_divergence:.3f}{speed} "
        f"{row.memory_bytes / 1e9:.1f} GB {row.seconds:.0f} s"
    )


# --- the result


def _write(request: Request, opened: Opened, progress: Progress) -> None:
    """Write the recovered model, if it is not there already, and record the recovery in its run.

    The record lies beside the model's path before the model is written, so that a kill in between costs nothing.
    """
    run, out = request.run, expanded(request.out)
    if not holds_result(out, run):
        recovery, tensors = _result(request, opened, progress)
        record = recovery.content(read_recoveries(opened.student.directory))
        write_record(run / WRITING_RECORD, record | {"out": str(out.resolve())})
        plan = plan_again(opened.student.directory, None, request.format, tensors, recovery)
        with progress.writing(f"writing {out}", plan.progress_bytes) as on_bytes:
            plan.write(out, on_bytes)
    record = read_record(run / WRITING_RECORD)
    del record["out"]
    write_record(run / RECOVERY_RECORD, record)
    _clean_up(run)


def _clean_up(run: Path) -> None:
    """Remove what a finished recovery no longer needs."""
    (run / WRITING_RECORD).unlink(missing_ok=True)
    remove_all(run)


def _result(request: Request, opened: Opened, progress: Progress) -> tuple[RecoveryRecord, dict[str, Tensor]]:
    """Return the record of the recovery, and the weights that did best on held-out text.

    There are none if no step did better than the weights before the training.
    """
    recipe, run = request.recipe, request.run
    chosen, rows = best(run), read_training_history(run)
    before = rows[0].heldout_divergence
    assert chosen is not None and chosen.heldout_divergence is not None, "the last step has a checkpoint"
    assert before is not None, "the first row is that of the start"
    trained: dict[str, Tensor] = {}
    after = chosen.heldout_divergence
    if after < before:
        trained, after = _as_written(request, opened, chosen, progress)
    helped = after < before
    if not helped:
        progress.say(
            f"warning: the training did not help: the held-out divergence was {before:.4f} before it and {after:.4f} "
            "at its best. The weights are written as they were. Lower recover.learning_rate, or raise recover.tokens."
        )
    settings, record = recipe.recover, opened.record
    recovery = RecoveryRecord(
        student=record.student,
        fingerprint=record.fingerprint,
        teacher=record.teacher,
        teacher_fingerprint=record.teacher_fingerprint,
        text=record.text,
        train=settings.train,
        lora_rank=settings.lora_rank if settings.train == "lora" else None,
        tokens=rows[-1].tokens,
        steps=opened.schedule.steps,
        seconds=rows[-1].seconds,
        loss_before=before,
        loss_after=min(before, after),
        best_step=chosen.step if helped else 0,
        recipe=dump(recipe),
    )
    return recovery, trained if helped else {}


def _as_written(
    request: Request, opened: Opened, chosen: TrainingCheckpoint, progress: Progress
) -> tuple[dict[str, Tensor], float]:
    """Return the weights of a checkpoint, and the divergence on held-out text that they will have once written.

    A model in 16 bits rounds them, and adapters are added to its weights before that, so they are measured again.
    """
    recipe, settings = request.recipe, request.recipe.recover
    trained = trained_tensors(_load_student(opened, recipe, chosen)[1])
    stored = stored_dtype(read_config(opened.student))
    if stored == torch.float32:
        assert chosen.heldout_divergence is not None, "the best checkpoint was evaluated"
        return trained, chosen.heldout_divergence
    bfloat16, device = opened.record.products == "bfloat16", device_of(recipe)
    teacher: Teacher = (
        _cached_teacher(request, opened, ALONE, progress)
        if settings.teacher == "cached"
        else _live_teacher(request, opened, progress, beside_student=True)
    )
    with progress.working(f"measuring what {request.out} will be"):
        dtype = loaded_dtype(settings.train, bfloat16=bfloat16)
        student = load_prunable(opened.student, dtype, [device]).module
        take_rounded(student, trained, stored)
        return trained, heldout_divergence(student, opened.text, teacher, settings, bfloat16=bfloat16)
