"""Resume a search: check that a run directory belongs to this search, and find its last checkpoint.

A directory that is damaged or belongs to another search is refused. Nothing in it is ever overwritten.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from pgprune_cli.errors import UserError
from pgprune_cli.model.devices import fastest_dtype
from pgprune_cli.recipe.reader import dump, parse
from pgprune_cli.recipe.schema import EvaluationSettings, Recipe
from pgprune_cli.run.checkpoint import Checkpoint, drop_old, latest_checkpoint
from pgprune_cli.run.decision import Decision
from pgprune_cli.run.history import refuse_other_history
from pgprune_cli.run.layout import DECISION_RECORD, METRICS_FILE, RECIPE_FILE


def with_dtype(recipe: Recipe, run: Path | None = None) -> Recipe:
    """Return the recipe with a dtype in place of `fastest`: that of the run, or of this machine if it is a new one.

    So a search that is resumed on another machine goes on in the same dtype. Raises UserError if the run's recipe is
    damaged, or if this machine does not have the recipe's device.
    """
    if recipe.dtype != "fastest":
        return recipe
    path = None if run is None else run / RECIPE_FILE
    if path is not None and path.exists():
        return replace(recipe, dtype=parse(path.read_text(encoding="utf-8"), f"{path}").dtype)
    return replace(recipe, dtype=fastest_dtype(recipe.device))


def identity_of(recipe: Recipe, fingerprint: str, origin: Tensor) -> str:
    """Return a digest of what a checkpoint depends on: the recipe, the model and the start of the policy."""
    return hashlib.sha256(_comparable(recipe).encode() + fingerprint.encode() + origin.numpy().tobytes()).hexdigest()


def _comparable(recipe: Recipe) -> str:
    """Return the recipe as YAML, without the settings that change no result: device, checkpoints and evaluation."""
    search = replace(recipe.search, checkpoint_every=1)
    return dump(replace(recipe, device="auto", evaluation=EvaluationSettings(), search=search))


def load_finished(run: Path, recipe: Recipe) -> Decision:
    """Return the decision of a finished run. Raise UserError if it is damaged or belongs to another recipe."""
    decision = Decision.load(run)
    refuse_other_recipe(run, recipe)
    refuse_other_decision(run, decision)
    return decision


def refuse_other_decision(run: Path, decision: Decision) -> None:
    """Raise UserError if the decision was made with another recipe than the one in the run directory."""
    if (run / RECIPE_FILE).exists() and _search_settings((run / RECIPE_FILE).read_text()) != _search_settings(
        decision.recipe
    ):
        raise UserError(
            f"{run / DECISION_RECORD}: does not belong to the {RECIPE_FILE} in this directory. "
            f"Restore the matching {DECISION_RECORD}."
        )


def _search_settings(recipe: str) -> dict[str, Any]:
    """Return the settings of a resolved recipe that the decision depends on."""
    return {key: value for key, value in yaml.safe_load(recipe).items() if key not in ("device", "evaluation")}


def refuse_other_recipe(run: Path, recipe: Recipe) -> None:
    """Raise UserError if the run was started with a recipe that gives another result."""
    if not (run / RECIPE_FILE).exists():
        return
    before = _comparable(parse((run / RECIPE_FILE).read_text(encoding="utf-8"), f"{run / RECIPE_FILE}")).splitlines()
    now = _comparable(recipe).splitlines()
    changed = [f"{old.strip()} → {new.strip()}" for old, new in zip(before, now, strict=True) if old != new]
    if changed:
        raise UserError(
            f"{run}: belongs to another recipe ({', '.join(changed)}). Choose another directory with --out, "
            "or remove this one to start over."
        )


def resume(run: Path, identity: str, skip_corrupt_checkpoint: bool = False) -> Checkpoint | None:
    """Return the checkpoint that a search resumes from, and cut the history back to its step.

    Without a checkpoint, remove the history and return None: the search starts at the beginning.

    Raises:
        UserError: the checkpoint is damaged or belongs to another search, or the history does not match it.
    """
    checkpoint = latest_checkpoint(run, skip_corrupt_checkpoint)
    if checkpoint is None:
        (run / METRICS_FILE).unlink(missing_ok=True)
        return None
    if checkpoint.identity != identity:
        raise UserError(
            f"{run}: the checkpoint belongs to other scores or another model. Remove the directory to start over."
        )
    refuse_other_history(run, checkpoint.history)
    os.truncate(run / METRICS_FILE, checkpoint.history.bytes)
    drop_old(run)
    return checkpoint
