"""The models under evaluation: a dense model, an exported one, or a run directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pgprune_cli.console.progress import SILENT, Progress
from pgprune_cli.errors import UserError
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.jobs.evaluation_request import Corpus
from pgprune_cli.model.loading import load_model, load_prunable
from pgprune_cli.model.masks import ModelMask, Outputs
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.source import Source, resolve
from pgprune_cli.recipe.reader import UnknownKeys, load, parse
from pgprune_cli.recipe.schema import EvaluationSettings
from pgprune_cli.run.decision import Decision, read_origin
from pgprune_cli.run.layout import DECISION_RECORD, RECIPE_FILE, is_run


@dataclass(frozen=True)
class Target:
    """A model under evaluation.

    Attributes:
        model: for a run directory, the base model as a PrunableModel; for any other model, the transformers model.
        model_mask: what a run keeps of its base model; None for any other model.
        outputs: the repaired output projections of a run.
        evaluation: what the recipe of a run or of an exported model says to evaluate, otherwise the defaults.
        base: the model that this one was pruned from, by its name in the decision; None for a dense model.
    """

    name: str
    source: Source
    model: PrunableModel | nn.Module
    model_mask: ModelMask | None
    outputs: Outputs
    evaluation: EvaluationSettings
    base: str | None

    @property
    def module(self) -> Any:
        """The transformers model; for a run, the dense base model."""
        return self.model.module if isinstance(self.model, PrunableModel) else self.model

    @contextmanager
    def ready(self) -> Iterator[nn.Module]:
        """Yield the model to measure: for a run, the base model, shrunk to the mask inside the `with`."""
        if isinstance(self.model, PrunableModel) and self.model_mask is not None:
            with Evaluator(self.model).shrunk(self.model_mask, self.outputs) as model:
                yield model
        else:
            yield self.module

    def parameters(self) -> int:
        """Count the kept parameters. Tied parameters count once."""
        total: int = sum(parameter.numel() for parameter in self.module.parameters())
        if isinstance(self.model, PrunableModel) and self.model_mask is not None:
            shape = self.model.shape
            total -= shape.cost(shape.parameters) - shape.cost(shape.parameters, self.model_mask)
        return total

    def description(self) -> dict[str, Any]:
        """Return what a result says about the model itself."""
        return {
            "model": self.name,
            "dtype": str(self.module.dtype).removeprefix("torch."),
            "device": str(self.module.get_input_embeddings().weight.device),
            "parameters": self.parameters(),
        }


def open_target(
    name: str,
    *,
    dtype: str | None = None,
    device: str | None = None,
    uses_recipe: bool = False,
    progress: Progress = SILENT,
) -> Target:
    """Load a model to evaluate. `dtype` and `device` default to the recipe's for a run, and to auto for other models.

    uses_recipe: the recipe's corpora will be evaluated, so check that they exist before loading anything.

    Raises:
        UserError: the model, its run or one of the recipe's corpora is damaged or does not exist.
    """
    if is_run(Path(name)):
        return _open_run(name, dtype, device, uses_recipe, progress)
    source = resolve(name)
    evaluation, base = _evaluation_of_export(source, progress)
    if uses_recipe:
        Corpus.of(evaluation)
    with progress.working(f"loading {name}"):
        model = load_model(source, dtype or "auto", device or "auto")
    return Target(name, source, model, None, {}, evaluation, base)


def _open_run(name: str, dtype: str | None, device: str | None, uses_recipe: bool, progress: Progress) -> Target:
    run = Path(name)
    decision = Decision.load(run)
    recipe = load(run / RECIPE_FILE)
    source = resolve(recipe.model)
    if source.fingerprint() != decision.fingerprint:
        raise UserError(
            f"{name}: {recipe.model} is not the model that was searched, because its files have changed. "
            "Restore them or search again."
        )
    if uses_recipe:
        Corpus.of(recipe.evaluation)
    with progress.working(f"loading {name}"):
        model = load_prunable(source, dtype or recipe.dtype, device or recipe.device)
    return Target(name, source, model, decision.model_mask, decision.outputs, recipe.evaluation, source.name)


def _evaluation_of_export(source: Source, progress: Progress) -> tuple[EvaluationSettings, str | None]:
    """Return what the decision beside a model says to evaluate, and its base model; the defaults for a dense model."""
    origin = read_origin(source.directory)
    if origin is None:
        return EvaluationSettings(), None
    record = source.directory / DECISION_RECORD
    try:
        return parse(origin.recipe, f"{record}: its recipe").evaluation, origin.model
    except UnknownKeys:
        progress.say(
            f"{record}: its recipe was written by another version of pgprune. The default corpora and window lengths "
            "are used."
        )
        return EvaluationSettings(), origin.model
