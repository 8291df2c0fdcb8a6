"""eval --tasks: accuracies measured by EleutherAI's lm-evaluation-harness on the model in memory."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from pgprune_cli.console.progress import SILENT, Progress
from pgprune_cli.console.suggest import nearest
from pgprune_cli.data.bos import adds_bos
from pgprune_cli.errors import RunError, UserError, in_short
from pgprune_cli.jobs.targets import Target
from pgprune_cli.model.loading import load_tokenizer
from pgprune_cli.storage.records import finite

BATCH = 8
"""Answers scored together. Fixed, so that a result does not depend on how much memory is free."""

FEWSHOT_SEED = 1234
"""Chooses the examples in the prompt; the harness's own default."""


def load_tasks(names: Sequence[str], *, progress: Progress = SILENT) -> dict[str, Any]:
    """Load tasks with their data, as the harness holds them. A name is one of the harness's or a YAML file.

    Raises:
        UserError: the harness is not installed, or a task does not exist, is wrong or lacks its data.
    """
    try:
        import lm_eval.models.huggingface  # noqa: F401  (needs more than lm_eval alone)
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"--tasks needs an extra. Install it with: pip install 'pgprune[eval]' ({error})") from None
    if missing := [name for name in names if name.endswith(".yaml") and not Path(name).is_file()]:
        raise UserError(f"--tasks {missing[0]}: no such file.")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with _working(f"loading {', '.join(names)}", progress):
        # Building the index of 14,000 tasks takes a while, and files do not need it.
        manager: Any = TaskManager(include_defaults=not all(Path(name).is_file() for name in names))
        tasks: dict[str, Any] = {"tasks": {}, "groups": {}}
        for name in names:
            loaded = _load_task(name, manager)
            for kind, members in tasks.items():
                members.update(loaded[kind])
    for task in tasks["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(FEWSHOT_SEED)
    return tasks


def _load_task(name: str, manager: Any) -> Any:
    is_file = Path(name).is_file()
    if not is_file and name not in manager.all_tasks:
        hint = nearest(name, manager.all_tasks) or "."
        raise UserError(f"--tasks {name}: no such file or task{hint} `lm_eval ls tasks` lists the tasks.")
    if is_file and re.search(r"^group:", Path(name).read_text(errors="replace"), re.MULTILINE):
        raise UserError(
            f"--tasks {name}: this is a group, but lm_eval loads groups only by name. "
            "Give the files of its tasks instead."
        )
    try:
        return manager.load([name])
    except Exception as error:  # bad YAML, bad templates and missing data all raise errors of their own
        raise UserError(f"--tasks {name}: cannot be loaded: {in_short(error)}") from error


def measure_tasks(
    target: Target, tasks: dict[str, Any], *, max_items: int | None = None, progress: Progress = SILENT
) -> list[dict[str, Any]]:
    """Measure every metric of every task, as the rows that `--json` prints. A group with metrics of its own is one row.

    max_items: only the first items of each task, as the harness's own `--limit`. `stderr` is the standard error over
    the items. It and `value` are None if they are not finite, `stderr` also if the harness has none. Prompts begin with
    BOS as `target.evaluation.bos` says; `auto` leaves it to the tokenizer, as the harness does.

    Raises UserError if prompts should begin with BOS and the tokenizer cannot add it, RunError if a metric overflows.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    with _working(f"tasks of {target.name}", progress):
        tokenizer, bos = _tokenizer(target)
        # None lets the tokenizer add its special tokens, False keeps it from adding any.
        add_special_tokens = False if target.evaluation.bos is False else None
        wrapped = HFLM(
            pretrained=target.module,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=BATCH,
            add_bos_token=add_special_tokens,
        )
        try:
            measured: Any = evaluate(wrapped, tasks, limit=max_items, bootstrap_iters=1000, log_samples=False)
        except ArithmeticError as error:  # a perplexity too large for a number
            raise RunError(
                f"{target.name}: the harness cannot compute a metric ({error}). Leave its task out."
            ) from error
    in_groups = {task for group in measured.get("groups", {}) for task in measured["group_subtasks"].get(group, [])}
    rows = []
    for name, metrics in measured["results"].items():
        for key, value in metrics.items():
            metric, _, filters = key.partition(",")
            is_metric = filters and not metric.endswith("_stderr") and isinstance(value, int | float)
            if name in in_groups or not is_metric:
                continue
            spread = metrics.get(f"{metric}_stderr,{filters}")
            rows.append(
                {
                    "task": name,
                    "metric": metric if filters == "none" else key,
                    "value": finite(float(value)),
                    "stderr": finite(float(spread)) if isinstance(spread, int | float) else None,
                    "items": metrics["sample_len"],
                    "shots": measured["n-shot"].get(name),
                    "bos": bos,
                }
            )
    return rows


def _tokenizer(target: Target) -> tuple[Any, bool]:
    """Return the tokenizer for the harness, and whether prompts begin with BOS.

    The harness can only keep a tokenizer from adding special tokens, so one that should add BOS is changed to do so.
    """
    tokenizer, setting = load_tokenizer(target.source), target.evaluation.bos
    bos = adds_bos(tokenizer) if setting == "auto" else setting
    if bos and not adds_bos(tokenizer):
        tokenizer.add_bos_token = True
        if not adds_bos(tokenizer):
            raise UserError(f"{target.name}: its tokenizer cannot add BOS to prompts. Set bos to auto or false.")
    return tokenizer, bos


@contextmanager
def _working(text: str, progress: Progress) -> Iterator[None]:
    """Let the harness draw its own bars on a terminal. Elsewhere hide them and announce the work in one line.

    What it prints on stdout is not a result.
    """
    if sys.stderr.isatty() and progress.shows:
        with redirect_stdout(sys.stderr):
            yield
    else:
        with progress.working(text), redirect_stderr(StringIO()), redirect_stdout(StringIO()):
            yield
