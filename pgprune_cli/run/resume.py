"""What belongs to one run of a search: the recipe it was begun with and its checkpoints.

A directory is refused where it is another run's or damaged; nothing in it is ever started over.
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
from pgprune_cli.recipe.reader import dump, parse
from pgprune_cli.recipe.schema import EvaluationSettings, Recipe
from pgprune_cli.run.checkpoint import Checkpoint, drop_old, latest_checkpoint
from pgprune_cli.run.decision import Decision
from pgprune_cli.run.history import refuse_other_history
from pgprune_cli.run.layout import DECISION_RECORD, METRICS_FILE, RECIPE_FILE


def identity_of(recipe: Recipe, fingerprint: str, origin: Tensor) -> str:
    """Digest of all that a checkpoint may not be mixed up with: the recipe, the model and where the policy starts."""
    return hashlib.sha256(_comparable(recipe).encode() + fingerprint.encode() + origin.numpy().tobytes()).hexdigest()


def _comparable(recipe: Recipe) -> str:
    """The recipe without what changes no result: where it runs, how often it saves, what is evaluated later."""
    search = replace(recipe.search, checkpoint_every=1)
    return dump(replace(recipe, device="auto", evaluation=EvaluationSettings(), search=search))


def finished(run: Path, recipe: Recipe) -> Decision:
    """The decision of a run that is done. Raises UserError where it is damaged or of another recipe."""
    decision = Decision.load(run)
    refuse_other_recipe(run, recipe)
    refuse_other_decision(run, decision)
    return decision


def refuse_other_decision(run: Path, decision: Decision) -> None:
    """Raises UserError where the recipe of the run is not the one that the decision was made by."""
    if (run / RECIPE_FILE).exists() and _decides((run / RECIPE_FILE).read_text()) != _decides(decision.recipe):
        raise UserError(
            f"{run / DECISION_RECORD}: of another run than {RECIPE_FILE} beside it; put this run's own back"
        )


def _decides(recipe: str) -> dict[str, Any]:
    """What a resolved recipe says of the search itself."""
    return {key: value for key, value in yaml.safe_load(recipe).items() if key not in ("device", "evaluation")}


def refuse_other_recipe(run: Path, recipe: Recipe) -> None:
    """Raises UserError where the run was begun with a recipe that gives another result."""
    if not (run / RECIPE_FILE).exists():
        return
    before = _comparable(parse((run / RECIPE_FILE).read_text(encoding="utf-8"), f"{run / RECIPE_FILE}")).splitlines()
    now = _comparable(recipe).splitlines()
    changed = [f"{b.strip()} → {n.strip()}" for b, n in zip(before, now, strict=True) if b != n]
    if changed:
        raise UserError(
            f"{run}: belongs to another recipe ({'; '.join(changed)}); give another directory with --out, "
            "or remove this one to start over"
        )


def resumed(run: Path, identity: str, skip_corrupt_checkpoint: bool = False) -> Checkpoint | None:
    """What a search goes on from, its history cut back to that moment; None, and no history, at the beginning.

    Raises UserError for a checkpoint of another search or with damage, and for a history that is not the one it has.
    """
    checkpoint = latest_checkpoint(run, skip_corrupt_checkpoint)
    if checkpoint is None:
        (run / METRICS_FILE).unlink(missing_ok=True)
        return None
    if checkpoint.identity != identity:
        raise UserError(f"{run}: its checkpoint belongs to other scores or another model; remove it to start over")
    refuse_other_history(run, checkpoint.history)
    os.truncate(run / METRICS_FILE, checkpoint.history.bytes)
    drop_old(run)
    return checkpoint
