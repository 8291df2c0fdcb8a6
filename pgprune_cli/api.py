"""The Python API: `prune` a model, `evaluate` or `recover` one, and what to do with a `Pruned` run.

Each function calls the job behind the command of the same name. Jobs are imported late, because they import torch.
`recover` is imported from here: `pgprune_cli.recover` is a folder of the package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pgprune_cli.console.progress import Progress
    from pgprune_cli.run.decision import Decision


@dataclass(frozen=True)
class Pruned:
    """A finished run. `directory` is the run directory, `decision` says which units are kept."""

    directory: Path
    decision: Decision

    def __repr__(self) -> str:
        return f"Pruned({str(self.directory)!r}: {self.decision.model}, sparsity {self.decision.sparsity:.4f})"

    def evaluate(
        self,
        *,
        corpora: Sequence[str] = (),
        seqlens: Sequence[int] = (),
        bos: Literal["auto"] | bool | None = None,
        max_windows: int | None = None,
        tasks: Sequence[str] = (),
        max_items: int | None = None,
        speed: bool = False,
        baselines: Sequence[str] = (),
        base: str | None = None,
        progress: bool = False,
    ) -> dict[str, Any]:
        """Measure the pruned model, as `evaluate` does. Complete results are stored in the run directory.

        Raises:
            UserError: an argument is wrong. Speed is measured on an exported model: `evaluate(path, speed=True)`.
            RunError: the loss is not finite.
        """
        return evaluate(
            str(self.directory),
            corpora=corpora,
            seqlens=seqlens,
            bos=bos,
            max_windows=max_windows,
            tasks=tasks,
            max_items=max_items,
            speed=speed,
            baselines=baselines,
            base=base,
            progress=progress,
        )

    def export(
        self,
        out: str | Path,
        *,
        format: Literal["hf", "gguf", "mlx"] = "hf",
        dtype: str | None = None,
        shard_size: str | None = None,
        pad_empty_attention: bool = False,
        pad_kv_heads: int = 1,
        pad_ffn: int = 1,
        base: str | None = None,
        progress: bool = False,
    ) -> Path:
        """Write the smaller model to the new path `out` and return it. The options are those of `pgprune export`.

        base: where the base model is now, if it is not where the search found it.

        Raises:
            UserError: an option is wrong, or `out` already exists.
        """
        from pgprune_cli.jobs.export import export, options_of, target

        options = options_of(
            format,
            dtype=dtype,
            shard_size=shard_size,
            pad_empty_attention=pad_empty_attention,
            pad_kv_heads=pad_kv_heads,
            pad_ffn=pad_ffn,
        )
        path = target(self.directory, Path(out), format)
        export(self.directory, path, options, format=format, base=base, progress=_progress(progress))
        return path


def prune(
    recipe: str | Path,
    settings: Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = True,
) -> Pruned:
    """Score the units and search for those to keep, as `pgprune search` does. Resumes an interrupted search.

    Args:
        recipe: the name of a shipped recipe, or a recipe file.
        settings: recipe keys and values that override the recipe: `{"model": "me/mine", "budget.sparsity": 0.3}`.
        out: the run directory, `runs/<recipe>` by default.
        progress: report progress on stderr.

    Raises:
        UserError: an argument is wrong.
        RunError: the search failed.
        Interrupted: a signal stopped the search, for example because a notebook's kernel was interrupted. Its state
            is saved.
    """
    from pgprune_cli.jobs.search import search
    from pgprune_cli.recipe.reader import find, load, name_of
    from pgprune_cli.run.layout import runs_folder

    path = find(str(recipe))
    run = Path(out) if out is not None else runs_folder() / name_of(path)
    return Pruned(run, search(load(path, _overrides(settings)), run, progress=_progress(progress)))


def evaluate(
    model: str | Path,
    *,
    corpora: Sequence[str] = (),
    seqlens: Sequence[int] = (),
    bos: Literal["auto"] | bool | None = None,
    max_windows: int | None = None,
    tasks: Sequence[str] = (),
    max_items: int | None = None,
    speed: bool = False,
    baselines: Sequence[str] = (),
    base: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure perplexity, task accuracies and speed, and return the object that `pgprune eval --json` prints.

    Args:
        model: a model as in recipes, an exported model or a run directory.
        corpora: corpus names or NAME=FILE. Without corpora, tasks and speed, the recipe's corpora are used.
        seqlens: window lengths in tokens; by default the recipe's, or 128 and 2048.
        bos: whether windows and prompts begin with BOS, as `evaluation.bos`; by default the recipe's, or auto.
        max_windows: at most this many windows of the shortest length per corpus.
        tasks: names of lm-evaluation-harness tasks, or task files.
        max_items: only the first items of each task.
        speed: measure tokens per second and memory of an exported or dense model, and of its base model.
        baselines: further models to measure the same way. Their results are under the key `baselines`.
        base: where the base model is now, if a run or an export does not find it where the search did.
        progress: report progress on stderr.

    Raises:
        UserError: an argument is wrong.
        RunError: the loss is not finite.
    """
    from pgprune_cli.jobs.evaluate import evaluate, with_baselines
    from pgprune_cli.jobs.evaluation_request import EvaluationRequest

    request = EvaluationRequest(
        model=str(model),
        corpora=corpora,
        seqlens=seqlens,
        bos=bos,
        max_windows=max_windows,
        tasks=tasks,
        max_items=max_items,
        speed=speed,
        baselines=baselines,
        base=base,
    )
    return with_baselines(evaluate(request, progress=_progress(progress)))


def recover(
    model: str | Path,
    out: str | Path,
    settings: Mapping[str, Any] | None = None,
    *,
    recipe: str | Path | None = None,
    run: str | Path | None = None,
    teacher: str | None = None,
    teacher_cache: str | Path | None = None,
    format: Literal["hf", "gguf", "mlx"] = "hf",
    progress: bool = True,
) -> dict[str, Any]:
    """Train a pruned model to predict what its dense model predicts, and return what `pgprune recover --json` prints.

    Resumes an interrupted recovery.

    Args:
        model: a directory that `export` or `recover` wrote.
        out: the new path of the recovered model.
        settings: recipe keys and values that override the recipe: `{"recover.tokens": 1_000_000}`.
        recipe: the name of a shipped recipe, or a recipe file; by default the recipe that the model was pruned with.
        run: the run directory, `runs/<name of out>` by default.
        teacher: the dense model, by default the one that the pruned model comes from.
        teacher_cache: a directory of cached predictions that several recoveries can share; by default in the run
            directory.
        format: of the recovered model.
        progress: report progress on stderr.

    Raises:
        UserError: an argument is wrong.
        RunError: the recovery failed.
        Interrupted: a signal stopped the recovery. Its state is saved.
    """
    from pgprune_cli.jobs.recover import recover
    from pgprune_cli.jobs.recovery_request import Request, recipe_of
    from pgprune_cli.recipe.reader import find, load
    from pgprune_cli.run.layout import runs_folder

    out, overrides = Path(out), _overrides(settings)
    loaded = recipe_of(str(model), overrides) if recipe is None else load(find(str(recipe)), overrides)
    run = Path(run) if run is not None else runs_folder() / out.name
    cache = None if teacher_cache is None else Path(teacher_cache)
    request = Request(str(model), out, run, loaded, teacher, cache, format)
    return {"model": str(out), "run": str(run), **recover(request, progress=_progress(progress))}


def _overrides(settings: Mapping[str, Any] | None) -> list[str]:
    """Return settings as the options of `--set`."""
    return [f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" for key, value in (settings or {}).items()]


def _progress(shown: bool) -> Progress:
    from pgprune_cli.console.progress import SILENT, StderrProgress

    return StderrProgress() if shown else SILENT
