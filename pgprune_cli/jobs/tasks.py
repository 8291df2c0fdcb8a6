"""eval --tasks: accuracies through EleutherAI's lm-evaluation-harness, of the model in memory."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgprune_cli.console.progress import SILENT, Progress
from pgprune_cli.console.suggest import nearest
from pgprune_cli.errors import UserError
from pgprune_cli.model.loading import load_tokenizer

if TYPE_CHECKING:
    from pgprune_cli.jobs.evaluate import Target

BATCH = 8
"""Choices of answers that run together. Fixed, so that a result does not depend on the memory that is free."""

FEWSHOT_SEED = 1234
"""Chooses the examples in the prompt; the harness's own default."""


def names_of(option: str) -> list[str]:
    """`hellaswag,piqa` as a list. Raises UserError."""
    names = [name.strip() for name in option.split(",")]
    if not all(names):
        raise UserError(f"--tasks {option}: expected names or files with commas, such as hellaswag,piqa")
    return list(dict.fromkeys(names))


def load_tasks(names: Sequence[str], progress: Progress = SILENT) -> dict[str, Any]:
    """The tasks with their data, as the harness holds them: names that it knows, or YAML files in its format.

    Raises UserError where the harness is not installed, or a task is unknown, wrong or its data not to be had.
    """
    try:
        import lm_eval.models.huggingface  # noqa: F401  (needs more than lm_eval alone)
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"--tasks needs the extra: pip install 'pgprune[eval]' ({error})") from None
    if missing := [name for name in names if name.endswith(".yaml") and not Path(name).is_file()]:
        raise UserError(f"--tasks {missing[0]}: no such file")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with _at_work(f"loading {', '.join(names)}", progress):
        # its index of 14,000 tasks takes a while, and files do not need it
        manager = TaskManager(include_defaults=not all(Path(name).is_file() for name in names))
        tasks: dict[str, Any] = {"tasks": {}, "groups": {}}
        for name in names:
            if not Path(name).is_file() and name not in manager.all_tasks:
                meant = nearest(name, manager.all_tasks)
                raise UserError(f"--tasks {name}: no file, and no task of the harness (`lm_eval ls tasks`){meant}")
            if Path(name).is_file() and re.search(r"^group:", Path(name).read_text(errors="replace"), re.MULTILINE):
                raise UserError(f"--tasks {name}: a group, which the harness reads by name only; give its tasks' files")
            try:
                loaded: Any = manager.load([name])
            except Exception as error:  # bad YAML, bad templates, data that is not there: each has a kind of its own
                reason = " ".join(str(error).split())[:300]
                raise UserError(f"--tasks {name}: cannot be loaded: {reason}") from error
            for kind, found in tasks.items():
                found.update(loaded[kind])
    for task in tasks["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(FEWSHOT_SEED)
    return tasks


def measure_tasks(
    target: Target, tasks: dict[str, Any], limit: int | None, progress: Progress = SILENT
) -> list[dict[str, Any]]:
    """Every metric of every task, as the rows that `--json` prints; of a group, its own where it has any.

    `limit`: only the first so many items of each task, as the harness's own `--max-windows`. `stderr` is the standard error
    over the items, None where the harness has none.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    with _at_work(f"tasks of {target.name}", progress), target.ready() as model:
        wrapped = HFLM(pretrained=model, tokenizer=load_tokenizer(target.source), backend="causal", batch_size=BATCH)
        found = evaluate(wrapped, tasks, limit=limit, bootstrap_iters=1000, log_samples=False)
    summarised = {member for group in found.get("groups", {}) for member in found["group_subtasks"].get(group, [])}
    rows = []
    for name, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, rest = key.partition(",")
            if name in summarised or not rest or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{rest}")
            rows.append(
                {
                    "task": name,
                    "metric": metric if rest == "none" else key,
                    "value": float(value),
                    "stderr": float(error) if isinstance(error, int | float) else None,
                    "items": metrics["sample_len"],
                    "shots": found["n-shot"].get(name),
                }
            )
    return rows


@contextmanager
def _at_work(text: str, progress: Progress) -> Iterator[None]:
    """On a terminal the harness draws its own bars; elsewhere they are noise, and a line says what takes a while."""
    if sys.stderr.isatty() and progress.shows:
        yield
    else:
        with progress.working(text), redirect_stderr(StringIO()):
            yield
