"""eval: perplexity, task accuracies and speed of a model and its baselines."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pgprune_cli.console.progress import SILENT, Progress
from pgprune_cli.console.stderr import warn
from pgprune_cli.jobs.evaluation_request import Corpus, EvaluationRequest
from pgprune_cli.jobs.perplexity import measure_perplexity
from pgprune_cli.jobs.speed import measure_speed
from pgprune_cli.jobs.targets import Target, open_target
from pgprune_cli.jobs.tasks import load_tasks, measure_tasks
from pgprune_cli.model.source import Source
from pgprune_cli.run.layout import EVALUATION_FILE
from pgprune_cli.run.provenance import record_command
from pgprune_cli.storage.paths import expanded
from pgprune_cli.storage.records import read_record, write_record


def evaluate(request: EvaluationRequest, *, progress: Progress = SILENT) -> list[dict[str, Any]]:
    """Measure a model and its baselines. Return one result each, the model's first.

    Complete results of run directories are also stored there, for the model card that an export writes.

    Raises:
        UserError: a model, corpus or task is damaged or does not exist.
        RunError: a loss is not finite.
    """
    request.check()
    tasks = load_tasks(request.tasks, progress=progress) if request.tasks else None
    targets = _open_targets(request, progress)
    is_complete = request.max_windows is None and request.max_items is None
    for target in targets:
        if is_complete and target.is_run:
            _remembered(expanded(target.name))  # refuses damage before hours of work
    evaluation = targets[0].evaluation
    corpora = Corpus.of(evaluation) if request.uses_recipe else request.parsed_corpora()
    seqlens = request.seqlens or evaluation.seqlen
    results = []
    for target in targets:
        rows = measure_perplexity(target, corpora, seqlens, max_windows=request.max_windows, progress=progress)
        results.append(target.description() | {"perplexity": rows})
    if tasks is not None:
        for target, result in zip(targets, results, strict=True):
            result["tasks"] = measure_tasks(target, tasks, max_items=request.max_items, progress=progress)
    if request.speed:
        for result, speed in zip(results, measure_speed(targets), strict=True):
            result["speed"] = speed
    if is_complete and (corpora or tasks):
        for target, result in zip(targets, results, strict=True):
            if target.is_run:
                remember(expanded(target.name), result)
    return results


def with_baselines(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the results of `evaluate` as the one object that `--json` prints."""
    return results[0] | ({"baselines": list(results[1:])} if results[1:] else {})


def _open_targets(request: EvaluationRequest, progress: Progress) -> list[Target]:
    """Load the model and its baselines. When speed is measured, the base model is a baseline too."""
    load = partial(open_target, dtype=request.dtype, device=request.device, progress=progress)
    target = load(
        request.model,
        bos=request.bos if request.reads_text else "auto",
        uses_recipe=request.uses_recipe,
        base=request.base,
        finds_base=request.speed,
    )
    sources: dict[str, Source | None] = dict.fromkeys(request.baselines)
    if target.base is not None:
        sources.setdefault(target.base.name, target.base)
    return [target, *(load(name, bos=target.evaluation.bos, source=source) for name, source in sources.items())]


def _remembered(run: Path) -> dict[str, Any]:
    """Return what earlier calls stored of a run. Raises UserError if it is damaged."""
    path = run / EVALUATION_FILE
    return read_record(path) if path.exists() else {}


def remember(run: Path, result: dict[str, Any]) -> None:
    """Store the result of a run in its directory, or say why it cannot be stored.

    Rows that other calls measured in the same dtype on the same device, and this one did not, are kept.
    """
    before = _remembered(run)
    if all(before.get(key) == result[key] for key in ("parameters", "dtype", "device")):
        lists = [key for key in ("perplexity", "tasks") if key in before or key in result]
        result = result | {key: _merged(before.get(key, []), result.get(key, [])) for key in lists}
    path = run / EVALUATION_FILE
    try:
        write_record(path, result)
        record_command(run)
    except OSError as error:  # the measurements took hours, and are still returned
        warn(f"{path}: the results cannot be stored there ({error.strerror}).")


def _merged(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of two evaluations. One that both have is that of the later evaluation."""

    def name(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(key) for key in ("corpus", "seqlen", "task", "metric", "bos"))

    return [*(row for row in before if name(row) not in map(name, now)), *now]
