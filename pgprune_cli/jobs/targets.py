"""The models under evaluation: a dense model, an exported one, or a run directory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from pgprune_cli.console.progress import SILENT, Progress
from pgprune_cli.data.bos import bos_token
from pgprune_cli.errors import UserError
from pgprune_cli.forward.masked import shrink
from pgprune_cli.jobs.evaluation_request import Corpus
from pgprune_cli.model.loading import load_model, load_prunable, load_tokenizer
from pgprune_cli.model.source import Source, resolve
from pgprune_cli.recipe.reader import UnknownKeys, load, parse
from pgprune_cli.recipe.schema import Bos, EvaluationSettings
from pgprune_cli.run.base import find_base
from pgprune_cli.run.decision import Decision, Origin, read_origin, refuse_other_base
from pgprune_cli.run.layout import DECISION_RECORD, RECIPE_FILE, is_run
from pgprune_cli.storage.paths import expanded


@dataclass(frozen=True)
class Target:
    """A model under evaluation.

    Attributes:
        module: the transformers model; for a run directory, the base model, shrunk to what the run keeps.
        parameters: number of kept parameters. Tied parameters count once.
        is_run: whether it is a run directory.
        evaluation: what the recipe of a run or of an exported model says to evaluate, otherwise the defaults. Its `bos`
            is the one asked for, if any was.
        base: for an export, the model that it was pruned from, if it was asked for and found; otherwise None.
    """

    name: str
    source: Source
    module: Any
    parameters: int
    is_run: bool
    evaluation: EvaluationSettings
    base: Source | None

    def description(self) -> dict[str, Any]:
        """Return what a result says about the model itself."""
        return {
            "model": self.name,
            "dtype": str(self.module.dtype).removeprefix("torch."),
            "device": str(self.module.get_input_embeddings().weight.device),
            "parameters": self.parameters,
        }


def open_target(
    name: str,
    *,
    dtype: str | None = None,
    device: str | None = None,
    bos: Bos | None = None,
    uses_recipe: bool = False,
    base: str | None = None,
    finds_base: bool = False,
    source: Source | None = None,
    progress: Progress = SILENT,
) -> Target:
    """Load a model to evaluate. `dtype` and `device` default to the recipe's for a run, and to auto for other models.

    bos: replaces the `bos` of the recipe; None keeps it. uses_recipe: the recipe's corpora will be evaluated, so check
    that they exist before loading anything. base: where the base model of a run or an export is now, if not
    where it says. finds_base: find the base model of an export before loading anything. source: the files of a model
    other than a run, if they are found already.

    Raises:
        UserError: the model, its run or one of the recipe's corpora is damaged or does not exist, or windows should
            begin with BOS and the tokenizer has none.
    """
    if is_run(expanded(name)):
        return _open_run(name, dtype, device, bos, uses_recipe, base, progress)
    source = source or resolve(name)
    origin = read_origin(source.directory)
    evaluation = _checked(_evaluation_of_export(source, origin, progress), bos, source, uses_recipe)
    base_source = _base_of_export(name, source, origin, base, progress) if finds_base else None
    with progress.working(f"loading {name}"):
        model = load_model(source, dtype or "auto", device or "auto")
    return Target(name, source, model, _parameters(model), False, evaluation, base_source)


def _open_run(
    name: str,
    dtype: str | None,
    device: str | None,
    bos: Bos | None,
    uses_recipe: bool,
    base: str | None,
    progress: Progress,
) -> Target:
    run = expanded(name)
    decision = Decision.load(run)
    recipe = load(run / RECIPE_FILE)
    source = find_base(decision, run, base)
    refuse_other_base(source, decision, run / DECISION_RECORD)
    evaluation = _checked(recipe.evaluation, bos, source, uses_recipe)
    with progress.working(f"loading {name}"):
        model = load_prunable(source, dtype or recipe.dtype, device or recipe.device)
        costs, shape = model.shape.parameters, model.shape
        kept = _parameters(model.module) - shape.cost(costs) + shape.cost(costs, decision.model_mask)
        shrink(model, decision.model_mask, decision.repaired)
    return Target(name, source, model.module, kept, True, evaluation, None)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _checked(recorded: EvaluationSettings, bos: Bos | None, source: Source, uses_recipe: bool) -> EvaluationSettings:
    """Return the settings with `bos`, if it is given. Raise UserError if the model or a corpus does not allow them."""
    evaluation = recorded if bos is None else replace(recorded, bos=bos)
    if uses_recipe:
        Corpus.of(evaluation)
    if evaluation.bos is True:
        bos_token(True, load_tokenizer(source), False, source.name)
    return evaluation


def _evaluation_of_export(source: Source, origin: Origin | None, progress: Progress) -> EvaluationSettings:
    """Return what the decision beside a model says to evaluate; the defaults for a dense model."""
    if origin is None:
        return EvaluationSettings()
    record = source.directory / DECISION_RECORD
    try:
        return parse(origin.recipe, f"{record}: its recipe").evaluation
    except UnknownKeys:
        progress.say(
            f"{record}: its recipe was written by another version of pgprune. The default corpora and window lengths "
            "are used."
        )
        return EvaluationSettings()


def _base_of_export(
    name: str, source: Source, origin: Origin | None, moved_to: str | None, progress: Progress
) -> Source | None:
    """Return the base model of an exported model, or None for a dense model.

    If it is not where the export says, say so and return None: the export is measured alone.

    Raises:
        UserError: what is there is not the base model, or `moved_to` is given and there is none.
    """
    if origin is None:
        if moved_to is not None:
            raise UserError(f"--model {moved_to}: {name} is not an export, so it has no base model.")
        return None
    try:
        base = find_base(origin, Path(name), moved_to)
    except UserError as error:
        if moved_to is not None:
            raise
        progress.say(f"{error} Only the speed of {name} itself is measured.")
        return None
    refuse_other_base(base, origin, source.directory / DECISION_RECORD)
    return base
