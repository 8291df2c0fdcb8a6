"""Resume a search: check that a run directory belongs to this search, and find its last checkpoint.

A directory that is damaged or belongs to another search is refused. Nothing in it is ever overwritten.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from pgprune_cli.errors import UserError
from pgprune_cli.model.names import is_hub_name
from pgprune_cli.model.source import find_recorded
from pgprune_cli.recipe.reader import by_key, parse
from pgprune_cli.recipe.schema import EvaluationSettings, Recipe, RecoverSettings
from pgprune_cli.recipe.strict_yaml import compose, kind_of, read_text, to_yaml
from pgprune_cli.run.checkpoint import Checkpoint, drop_old, latest_checkpoint
from pgprune_cli.run.decision import Decision, refuse_other_base
from pgprune_cli.run.layout import DECISION_RECORD, METRICS_FILE, RECIPE_FILE, is_recovery_run
from pgprune_cli.run.settled import with_absolute_paths, with_metric_of_scores
from pgprune_cli.storage.rows import cut_back


def identity_of(recipe: Recipe, fingerprint: str, origin: Tensor) -> str:
    """Return a digest of what a checkpoint depends on: the recipe, the model and the start of the policy."""
    settings = json.dumps(_deciding(recipe)).encode()
    return hashlib.sha256(settings + fingerprint.encode() + origin.numpy().tobytes()).hexdigest()


def load_finished(run: Path, recipe: Recipe) -> Decision:
    """Return the decision of a finished run.

    Raises:
        UserError: it is damaged, belongs to another recipe, or to another model than the recipe's. Paths that do not
            exist are not compared.
    """
    decision = Decision.load(run)
    refuse_other_decision(run, decision)
    searched = parse(decision.recipe, f"{run / DECISION_RECORD}: its recipe")
    _refuse_changes(run, searched, with_metric_of_scores(recipe, run))
    source = find_recorded(recipe.model)
    changed = _changed({"model": decision.model}, {"model": recipe.model})
    if source is not None:
        try:
            refuse_other_base(source, decision, run / DECISION_RECORD)
        except UserError as error:
            if changed:
                raise _other_recipe(run, changed) from None
            raise UserError(f"{run}: the search is finished. {error}") from None
    elif changed and is_hub_name(recipe.model):  # not downloaded yet
        raise _other_recipe(run, changed)
    return decision


def refuse_other_decision(run: Path, decision: Decision) -> None:
    """Raise UserError if the run directory holds another recipe than that of the decision, or a damaged one."""
    path = run / RECIPE_FILE
    if not path.exists():
        return
    text = read_text(path)
    if not isinstance(root := compose(text, lambda line: f"{path}:{line}"), yaml.MappingNode):
        raise UserError(f"{path}: expected keys with values, got {kind_of(root)}")
    decided, recorded = _search_settings(decision.recipe), _search_settings(text)
    if changed := _changed(decided, recorded):
        raise UserError(
            f"{run / DECISION_RECORD}: does not belong to the {RECIPE_FILE} in this directory ({', '.join(changed)}). "
            f"Restore the matching {DECISION_RECORD}."
        )


def _search_settings(recipe: str) -> dict[str, Any]:
    """Return the settings of a resolved recipe that the decision depends on, by dotted key."""
    settings: dict[str, Any] = {}
    for name, value in yaml.safe_load(recipe).items():
        if isinstance(value, dict):
            settings |= {f"{name}.{key}": entry for key, entry in value.items()}
        else:
            settings[name] = value
    no_effect = ("device", "recover.", "evaluation.")
    return {key: value for key, value in settings.items() if not key.startswith(no_effect)}


def refuse_other_recipe(run: Path, recipe: Recipe, *, same_model: bool = False) -> None:
    """Raise UserError if the run was started with a recipe that gives another result, or is that of a recovery.

    same_model: the model is known to be that of the run, wherever it is now.
    """
    if is_recovery_run(run):
        raise UserError(f"{run}: holds a recovery. Choose another directory for the search with --out.")
    if (run / RECIPE_FILE).exists():
        before = parse(read_text(run / RECIPE_FILE), f"{run / RECIPE_FILE}")
        if not same_model and (names := _changed({"model": before.model}, {"model": recipe.model})):
            raise _other_recipe(run, names)
        _refuse_changes(run, before, recipe)


def refuse_to_replace_scores(run: Path, recipe: Recipe) -> None:
    """Raise UserError if a search has begun in the directory, and the scores of this recipe would not be its own."""
    refuse_other_recipe(run, recipe)
    if (run / DECISION_RECORD).exists() and not (run / RECIPE_FILE).exists():
        decision = Decision.load(run, with_repair=False)
        if names := _changed({"model": decision.model}, {"model": recipe.model}):
            raise _other_recipe(run, names)
        _refuse_changes(run, parse(decision.recipe, f"{run / DECISION_RECORD}: its recipe"), recipe)


def _refuse_changes(run: Path, before: Recipe, now: Recipe) -> None:
    if changed := _changed(_deciding(before), _deciding(now)):
        raise _other_recipe(run, changed)


def _other_recipe(run: Path, changed: list[str]) -> UserError:
    return UserError(
        f"{run}: belongs to another recipe ({', '.join(changed)}). Choose another directory with --out, or remove this "
        "one to start over."
    )


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return how settings differ, as `section.key: old → new`."""
    keys = [key for key in before | now if before.get(key) != now.get(key)]
    return [f"{key}: {to_yaml(before.get(key))} → {to_yaml(now.get(key))}" for key in keys]


def _deciding(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that a decision depends on besides the model, by dotted key.

    The model is known by its fingerprint. No result depends on the device, the checkpoints, the evaluation or the
    recovery that comes later.
    """
    compared = replace(
        with_absolute_paths(recipe),
        device="auto",
        search=replace(recipe.search, checkpoint_every=1),
        recover=RecoverSettings(),
        evaluation=EvaluationSettings(),
    )
    return {key: value for key, value in by_key(compared).items() if key != "model"}


def resume(run: Path, identity: str, skip_corrupt_checkpoint: bool = False) -> Checkpoint | None:
    """Return the checkpoint that a search resumes from, and cut the history back to its step.

    Without a checkpoint, remove the history and return None: the search starts at the beginning.

    Raises:
        UserError: the checkpoint is damaged or belongs to another search, or the history does not match it.
    """
    checkpoint = latest_checkpoint(run, skip_corrupt_checkpoint)
    if checkpoint is None:
        cut_back(run / METRICS_FILE, None)
        return None
    if checkpoint.identity != identity:
        raise UserError(
            f"{run}: the checkpoint belongs to other scores or another model. Remove the directory to start over."
        )
    cut_back(run / METRICS_FILE, checkpoint.history)
    drop_old(run)
    return checkpoint
