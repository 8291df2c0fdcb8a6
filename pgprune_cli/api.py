"""Pruning from Python: `prune`, and what one does with what it returns. Thin over the jobs, which it imports late."""

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
    """A finished run: `directory` holds all of it, `decision` says which units stay."""

    directory: Path
    decision: Decision

    def __repr__(self) -> str:
        return f"Pruned({str(self.directory)!r}: {self.decision.model}, sparsity {self.decision.sparsity:.4f})"

    def evaluate(
        self,
        corpora: Sequence[str] = (),
        seqlens: Sequence[int] = (),
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Perplexities as `pgprune eval RUN --json` gives them, by default those that the recipe asks for.

        `corpora`: names or NAME=FILE; `seqlens`: tokens; `limit`: as `--max-windows`. Raises UserError, RunError.
        """
        from pgprune_cli.console.progress import SILENT
        from pgprune_cli.jobs.evaluate import Corpus, evaluate, open_target, remember

        asked = [Corpus.parse(name) for name in corpora]
        target = open_target(str(self.directory), None, None, progress or SILENT, as_recipe=not asked)
        chosen = asked or Corpus.of(target.evaluation)
        result = evaluate(target, chosen, seqlens or target.evaluation.seqlen, limit, progress or SILENT)
        if limit is None:
            remember(target, result)
        return result

    def export(
        self,
        out: str | Path,
        format: Literal["hf", "gguf", "mlx"] = "hf",
        dtype: str | None = None,
        progress: Progress | None = None,
    ) -> Path:
        """Writes the smaller model as the new `out` and returns it; as `pgprune export`, which has more options.

        Raises UserError, also where there is something already.
        """
        from pgprune_cli.console.progress import SILENT
        from pgprune_cli.jobs.export import export, options_of, target

        options = options_of(format, dtype, None, False, 1, 1)
        path = target(self.directory, Path(out), format)
        export(self.directory, path, options, format, progress or SILENT)
        return path


def prune(
    recipe: str | Path,
    settings: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Pruned:
    """Scores and searches as `pgprune search` does, and goes on where an earlier call was stopped.

    Args:
        recipe: the name of one that ships, or a recipe file.
        settings: recipe keys with their values, as `--set` takes them: `{"model": "me/mine", "budget.sparsity": 0.3}`.
        out: the run directory; by default `runs/<recipe>`, as on the command line.

    Raises:
        UserError: what was given is wrong; RunError: it failed all the same.
        Interrupted: stopped by a signal, as when a notebook's kernel is interrupted; the state is saved.
    """
    from pgprune_cli.console.progress import StderrProgress
    from pgprune_cli.jobs.search import search
    from pgprune_cli.recipe.reader import find, load, name_of
    from pgprune_cli.run.layout import runs_folder

    path = find(str(recipe))
    overrides = [
        f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" for key, value in (settings or {}).items()
    ]
    run = Path(out) if out is not None else runs_folder() / name_of(path)
    return Pruned(run, search(load(path, overrides), run, progress=progress or StderrProgress()))
