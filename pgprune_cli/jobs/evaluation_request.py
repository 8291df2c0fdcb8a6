"""What an evaluation measures, checked before anything heavy is imported or loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pgprune_cli.console.commands import command_line
from pgprune_cli.data.corpora import check_corpus
from pgprune_cli.errors import UserError
from pgprune_cli.model.source import find_local
from pgprune_cli.recipe.schema import Bos, EvaluationSettings, name_and_text
from pgprune_cli.run.layout import is_run, refuse_unfinished, runs_folder
from pgprune_cli.storage.paths import expanded

DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Corpus:
    """A corpus to measure perplexity on.

    name: the name it is reported under; text: a corpus name or a file.
    """

    name: str
    text: str

    @classmethod
    def parse(cls, option: str) -> Corpus:
        """Parse `wikitext2` or `NAME=FILE`. Raises UserError."""
        name, text = name_and_text(option)
        if not (name and text):
            raise UserError(f"--ppl {option}: expected a corpus name or NAME=FILE.")
        return cls(name, text)

    @classmethod
    def of(cls, evaluation: EvaluationSettings) -> list[Corpus]:
        """Return the corpora that a recipe names. Raises UserError for one that does not exist, or names alike."""
        return _checked([cls(*name_and_text(corpus)) for corpus in evaluation.corpora], "evaluation.corpora:")


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What to measure, and on which models.

    Attributes:
        model: a model as in recipes, an exported model or a run directory.
        corpora: corpus names or NAME=FILE. If nothing else is requested either, the recipe's corpora are used.
        seqlens: window lengths in tokens; by default the recipe's, or 128 and 2048.
        max_windows: at most this many windows of the shortest length per corpus.
        tasks: names of lm-evaluation-harness tasks, or task files.
        max_items: only the first items of each task.
        speed: measure tokens per second and memory, also of the base model.
        baselines: further models to measure the same way.
        base: where the base model of a run is now, or of an export whose speed is measured.
        dtype: load in this dtype instead of the stored one (for a run: the recipe's).
        device: run on this device instead of a GPU if there is one (for a run: the recipe's).
        bos: whether windows and prompts begin with BOS, as `evaluation.bos`; by default the recipe's setting, or auto.
            It holds for the baselines too.
    """

    model: str
    corpora: Sequence[str] = ()
    seqlens: Sequence[int] = ()
    max_windows: int | None = None
    tasks: Sequence[str] = ()
    max_items: int | None = None
    speed: bool = False
    baselines: Sequence[str] = ()
    base: str | None = None
    dtype: str | None = None
    device: str | None = None
    bos: Bos | None = None

    @property
    def reads_text(self) -> bool:
        """Whether anything but speed is measured."""
        return bool(self.corpora or self.tasks or not self.speed)

    @property
    def uses_recipe(self) -> bool:
        """Whether the recipe's corpora are measured, because nothing else is requested."""
        return not (self.corpora or self.speed or self.tasks)

    def parsed_corpora(self) -> list[Corpus]:
        """Return the requested corpora. Raises UserError for one that does not exist, or names alike."""
        return _checked([Corpus.parse(option) for option in self.corpora], "--ppl")

    def check(self) -> None:
        """Raise UserError if a model, corpus or dtype does not exist, or if speed is requested of a run directory.

        Numbers that are too small are refused too: the Python API passes them on as they are.
        """
        if self.dtype not in (None, *DTYPES):
            raise UserError(f"--dtype {self.dtype}: expected {', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")
        for option, least, numbers in (
            ("--seqlen", 2, self.seqlens),  # one token predicts nothing
            ("--max-windows", 1, (self.max_windows,)),
            ("--max-items", 1, (self.max_items,)),
        ):
            for number in numbers:
                if number is not None and number < least:
                    raise UserError(f"{option} {number}: expected at least {least}.")
        if self.max_items is not None and not self.tasks:
            raise UserError("--max-items: counts items of --tasks, which is missing.")
        for name in (self.model, *self.baselines):
            self._check_model(name)
        if self.base is not None:
            if not self.speed and not is_run(expanded(self.model)):
                raise UserError(
                    f"--model {self.base}: only a run needs it, or an export with --speed, to find the base model. "
                    f"{self.model} is not a run. Leave this option out."
                )
            find_local(self.base)
        self.parsed_corpora()

    def _check_model(self, name: str) -> None:
        path = expanded(name)
        if is_run(path):
            refuse_unfinished(path)
            if self.speed:
                raise UserError(
                    f"{name}: speed is measured on an exported model, not on a run directory. "
                    f"Export it first: {command_line('pgprune', 'export', name)}"
                )
        elif runs_folder() in path.parents and not path.exists():
            refuse_unfinished(path)
        else:
            find_local(name)


def _checked(corpora: list[Corpus], option: str) -> list[Corpus]:
    """Return the corpora. Raise UserError if one does not exist, or if two would be reported under one name."""
    for corpus in corpora:
        check_corpus(corpus.text)
    names = [corpus.name for corpus in corpora]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{option} {twice[0]}: named twice. Give every text a name of its own, as NAME=FILE.")
    return corpora


def task_names(option: str) -> list[str]:
    """Split `hellaswag,piqa` into names, without repetitions. Raises UserError."""
    names = [name.strip() for name in option.split(",")]
    if not all(names):
        raise UserError(f"--tasks {option}: expected comma-separated task names or files, such as hellaswag,piqa.")
    return list(dict.fromkeys(names))
