"""What is known of a recovery before a model is loaded: student, teacher, text, and where its state is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from pgprune_cli.console.commands import command_line
from pgprune_cli.console.progress import Progress
from pgprune_cli.distributed import Ranks, ranks_from_environment
from pgprune_cli.errors import UserError
from pgprune_cli.export.formats import FORMATS, refuse_other_suffix
from pgprune_cli.export.plan import check_new
from pgprune_cli.export.trained import plan_again
from pgprune_cli.model.devices import devices_of, fastest_dtype
from pgprune_cli.model.source import Source, find_local
from pgprune_cli.recipe.reader import by_key, dump, parse
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.recover.checks import check_pair, find_teacher
from pgprune_cli.recover.schedule import Schedule
from pgprune_cli.recover.teacher_cache import CacheKey
from pgprune_cli.recover.texts import RecoveryText, recovery_corpus, recovery_text
from pgprune_cli.run.decision import read_origin
from pgprune_cli.run.layout import (
    DECISION_RECORD,
    RECIPE_FILE,
    RECOVERY_RECORD,
    TEACHER_FOLDER,
    TRAINING_RECORD,
    WRITING_RECORD,
    is_run,
)
from pgprune_cli.run.lock import refuse_unusable, refuse_unwritable
from pgprune_cli.run.provenance import record_command
from pgprune_cli.run.trackers import TrackerName, check_installed
from pgprune_cli.run.training_record import TrainingRecord
from pgprune_cli.storage.atomic import write_bytes
from pgprune_cli.storage.paths import expanded
from pgprune_cli.storage.records import read_record

IRRELEVANT = ("recover.corpus", "recover.checkpoint_every", "recover.gradient_checkpointing")
"""Settings that the result does not depend on, or that are known in another way."""


@dataclass(frozen=True)
class Request:
    """What to recover.

    model: a directory that `pgprune export` wrote; out: the new path; run: the run directory; recipe: its settings;
    teacher: the dense model, if not the one that the student was pruned from; teacher_cache: a directory of cached
    predictions that many students share; format: of the result.
    """

    model: str
    out: Path
    run: Path
    recipe: Recipe
    teacher: str | None = None
    teacher_cache: Path | None = None
    format: str = "hf"


@dataclass(frozen=True)
class Opened:
    """What is known before the models are loaded. streams: see `streams_to_match`; vocabulary: of the teacher;
    model_bytes: of the recovered model on disk."""

    student: Source
    teacher: Source
    text: RecoveryText
    record: TrainingRecord
    schedule: Schedule
    streams: Sequence[int]
    vocabulary: int
    model_bytes: int


def recipe_of(model: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in the decision of an exported model, with `overrides` as for `--set`. Raises UserError."""
    source = _student(model)
    origin = read_origin(source.directory)
    if origin is None:
        raise UserError(
            f"{model}: not a pruned model that `pgprune export` wrote, because it has no {DECISION_RECORD}. Give "
            "such a model, or a recipe with --recipe."
        )
    return parse(origin.recipe, f"{source.directory / DECISION_RECORD}: its recipe", overrides)


def missing_packages(recipe: Recipe) -> list[str]:
    """Return the packages that a recovery needs and that are not installed."""
    needed = ["accelerate", *(["peft"] if recipe.recover.train == "lora" else [])]
    return [name for name in needed if find_spec(name) is None]


def check(request: Request, tracker: TrackerName | None) -> None:
    """Raise UserError for what can be refused at once."""
    refuse_other_suffix(request.out, request.format)
    if missing := missing_packages(request.recipe):
        raise UserError(f"recover: needs {' and '.join(missing)}. Install it with: pip install 'pgprune[recovery]'")
    if tracker is not None:
        check_installed(tracker)
    if ranks_from_environment().is_writer:  # the test of the lock is in the way of another process's
        refuse_unusable(request.run, "--run-dir")
    if is_run(request.run) and not (request.run / TRAINING_RECORD).exists():
        raise UserError(f"{request.run}: holds a search. Choose another directory for the recovery with --run-dir.")
    out = expanded(request.out)
    if not holds_result(out, request.run):
        check_new(out, directory=not FORMATS[request.format].suffix)
    refuse_unwritable(out)
    for option, folder in {"--run-dir": request.run, "--teacher-cache": request.teacher_cache}.items():
        if folder is not None and folder.resolve().is_relative_to(out.resolve()):
            raise UserError(
                f"{request.out}: the recovered model cannot be written there, because {folder} keeps what the training "
                f"needs. Choose another directory with --out or {option}."
            )


def holds_result(out: Path, run: Path) -> bool:
    """Return whether `out` holds the whole model of this run already, because a kill prevented the run's own record.

    There was nothing at `out` when the run began to write the model, which appears there only when it is whole.
    """
    path = run / WRITING_RECORD
    if not path.exists() or read_record(path)["out"] != str(out.resolve()):
        return False
    return out.is_file() or (out.is_dir() and any(out.iterdir()))


def _student(model: str) -> Source:
    """Return the files of the model to recover. Raises UserError if it is not an exported model."""
    if is_run(Path(model)):
        raise UserError(f"{model}: a run, not a model. Export it first: {command_line('pgprune', 'export', model)}")
    source = find_local(model)
    if source is None or source.gguf is not None:
        raise UserError(f"{model}: not a directory that `pgprune export` wrote. Export the model with --format hf.")
    return source


def device_of(recipe: Recipe) -> torch.device:
    """Return the device of this process. Raises UserError for a device that a training cannot use."""
    if recipe.device.startswith("cuda:"):
        raise UserError(
            f"device: {recipe.device}: a recovery uses the first GPU, or one for each process of torchrun. "
            f"Set device to cuda, and choose GPUs with CUDA_VISIBLE_DEVICES={recipe.device.replace('cuda:', '')}."
        )
    return devices_of(recipe.device)[0]


def open_request(request: Request, ranks: Ranks, progress: Progress) -> Opened:
    """Read the text. Raise UserError if something does not fit, or if the run belongs to another recovery."""
    recipe, run = request.recipe, request.run
    student = _student(request.model)
    plan = plan_again(student.directory, format=request.format)  # refuses what could not be written in the end
    teacher = find_teacher(student, request.teacher)
    pair = check_pair(student, teacher, recipe.recover)
    with progress.working(f"reading {recovery_corpus(recipe)}"):
        text = recovery_text(recipe, student.name, pair.config, pair.tokenizer)
    schedule = Schedule.of(recipe.recover, ranks.world_size)
    earlier = TrainingRecord.read(run) if (run / TRAINING_RECORD).exists() else None
    record = TrainingRecord(
        student=str(student.directory.absolute()),
        fingerprint=student.fingerprint(),
        teacher=teacher.name,
        teacher_fingerprint=teacher.fingerprint(),
        text=recovery_corpus(recipe),
        text_digest=text.digest,
        settings=_settings(recipe),
        steps=schedule.steps,
        windows_per_step=schedule.windows_per_step,
        processes=ranks.world_size,
        products=fastest_dtype(recipe.device) if earlier is None else earlier.products,
    )
    if earlier is not None and (changed := earlier.differences(record)):
        raise _other_recovery(run, changed)
    return Opened(student, teacher, text, record, schedule, pair.streams, pair.vocabulary, plan.bytes)


def begin(request: Request, opened: Opened) -> None:
    """Write the resolved recipe and what is trained into the run directory."""
    opened.record.write(request.run)  # first: a run with a recipe and without this is that of a search
    write_bytes(request.run / RECIPE_FILE, dump(request.recipe).encode())
    record_command(request.run)


def cache_of(request: Request, opened: Opened) -> tuple[Path, CacheKey]:
    """Return where the dense model's predictions are cached, and what they depend on."""
    settings, fingerprint = request.recipe.recover, opened.record.teacher_fingerprint
    key = CacheKey.of(fingerprint, opened.text, opened.vocabulary, settings.top_k, settings.temperature)
    shared = request.teacher_cache
    return request.run / TEACHER_FOLDER if shared is None else key.folder_in(shared), key


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that the result depends on, by dotted key."""
    values = by_key(recipe)
    names = [key for key in values if key.startswith("recover.") and key not in IRRELEVANT]
    return {key: values[key] for key in ("seed", *names)}


def _other_recovery(run: Path, changed: Sequence[str]) -> UserError:
    return UserError(
        f"{run}: belongs to another recovery ({', '.join(changed)}). Choose another directory with --run-dir, or "
        "remove this one to start over."
    )


def finished(request: Request) -> dict[str, Any]:
    """Return the record of a finished recovery. Raises UserError if it had other settings, or its result is missing."""
    record = read_record(request.run / RECOVERY_RECORD)
    before = TrainingRecord.read(request.run)
    student = _student(request.model)
    now = replace(before, fingerprint=student.fingerprint(), settings=_settings(request.recipe))
    if request.teacher is not None:
        now = replace(now, teacher_fingerprint=find_teacher(student, request.teacher).fingerprint())
    changed, text = before.differences(now), recovery_corpus(request.recipe)
    if text != before.text:
        changed.append(f"text: {before.text} → {text}")
    if changed:
        raise _other_recovery(request.run, changed)
    if not expanded(request.out).exists():
        raise UserError(
            f"{request.run}: the recovery is finished, but {request.out} is missing. Give the path that it wrote, or "
            "remove the run directory to recover again."
        )
    return record
