"""Everything that a search is refused for before its first forward pass. `doctor` makes the same checks.

`search` makes the checks in order and stops at the first that fails. `doctor` makes all of them and prints what each
found, so the two cannot disagree. `init-scores` and `search --dry-run` make those that concern them. No check reads the
values of weights, and none downloads weights before the checks above it have passed.

To refuse something else, write a function that raises UserError and otherwise returns what it found in a few words,
and add it to CHECKS. The check of the memory is in `jobs/memory.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal

import torch

from pgprune_cli.data.tokens import first_token
from pgprune_cli.errors import UserError
from pgprune_cli.model.context import refuse_longer_windows
from pgprune_cli.model.loading import check_prunable, check_weights
from pgprune_cli.model.quantized import check_fp8
from pgprune_cli.model.stored import refuse_incomplete, stored_files
from pgprune_cli.model.weights import NO_ACCELERATE
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.run.layout import SCORES_FILE
from pgprune_cli.run.lock import refuse_unusable
from pgprune_cli.run.resume import refuse_other_recipe, refuse_to_replace_scores
from pgprune_cli.run.scores import Scores
from pgprune_cli.run.settled import with_metric_of_scores
from pgprune_cli.scores.metrics import CALIBRATED
from pgprune_cli.search.budget import check_budget
from pgprune_cli.search.preparation import Preparation
from pgprune_cli.search.sampled_text import NO_SAMPLED_WINDOWS
from pgprune_cli.search.scoring import refuse_other_scores
from pgprune_cli.search.texts import refuse_unsupported

Needs = Literal["machine", "config", "model"]
"""What a check reads: only this machine, the model's config, or all files of the model."""


@dataclass(frozen=True)
class Check:
    """One check.

    name: what is checked; find: returns what was found, for a person, or raises UserError; needs: what it reads;
    subject: returns what the check is about, for a person; scoring, estimate: whether `init-scores` and `search
    --dry-run` make this check too.
    """

    name: str
    find: Callable[[Preparation], str]
    needs: Needs
    subject: Callable[[Preparation], str] = lambda preparation: preparation.asked.model
    scoring: bool = True
    estimate: bool = False


def run_checks(preparation: Preparation, checks: Iterable[Check]) -> None:
    """Make the checks in order. Raises UserError for the first that fails."""
    for check in checks:
        check.find(preparation)


# --- the checks


def _device(preparation: Preparation) -> str:
    devices = preparation.devices
    if len(devices) > 1 and preparation.asked.device != "auto" and not find_spec("accelerate"):
        raise UserError(NO_ACCELERATE)
    return f"{preparation.asked.device}: {', '.join(map(str, devices))}, dtype {preparation.recipe.dtype}"


def _directory(preparation: Preparation) -> str:
    if preparation.run is None:
        return "nothing is written"
    refuse_unusable(preparation.run)
    return f"{preparation.run} can be written"


def _run(preparation: Preparation) -> str:
    run, recipe = preparation.run, preparation.recipe
    if run is None or not run.exists():
        return "a new one"
    scored = (run / SCORES_FILE).exists()  # then another check compares the model with that of the scores
    refuse_other_recipe(run, with_metric_of_scores(recipe, run), same_model=scored)
    return f"{run} belongs to this recipe"


def _run_to_score(preparation: Preparation) -> str:
    if preparation.run is not None:
        refuse_to_replace_scores(preparation.run, preparation.recipe)
    return f"{preparation.run} has no scores that a search of another recipe needs"


def _model(preparation: Preparation) -> str:
    source, recipe = preparation.config_source, preparation.recipe
    check_prunable(source, recipe.units.families)
    model = preparation.empty
    refuse_unsupported(recipe, model.config.model_type)
    return f"{recipe.model}, {model.config.model_type} with {model.shape.layers} layers"


def _windows(preparation: Preparation) -> str:
    lengths = window_lengths(preparation.recipe)
    refuse_longer_windows(preparation.empty.config, preparation.asked.model, lengths)
    return ", ".join(f"{key} {length}" for key, length in lengths.items())


def window_lengths(recipe: Recipe) -> dict[str, int]:
    """Return the tokens of the windows that a search reads, by recipe key."""
    lengths = {"calibration.seqlen": recipe.calibration.seqlen}
    return lengths | ({"scores.seqlen": recipe.scores.seqlen} if recipe.scores.metric in CALIBRATED else {})


def _budget(preparation: Preparation) -> str:
    settings = preparation.recipe.budget
    check_budget(preparation.recipe, preparation.empty)
    note = ", measured when the search begins" if settings.measure == "latency" else ""
    return f"removes {settings.sparsity:.0%} of the {settings.measure}{note}"


def _format(preparation: Preparation) -> str:
    recipe = preparation.recipe
    if recipe.weight_format == "fp8":
        dtype = preparation.empty.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
        for device in preparation.devices:
            check_fp8(device, dtype)
    return f"weight_format {recipe.weight_format}"


def _weights(preparation: Preparation) -> str:
    source = preparation.source
    weights = check_weights(source, preparation.empty.module)
    if source.gguf is None:
        refuse_incomplete(source.name, stored_files(source, preparation.empty.module), preparation.empty)
    size = sum(path.stat().st_size for path in source.weight_files())
    return f"{weights / 1e6:,.1f} million parameters, {size / 1e9:,.1f} GB"


def _scores(preparation: Preparation) -> str:
    if preparation.run is None or not (preparation.run / SCORES_FILE).exists():
        return f"{preparation.recipe.scores.metric}, computed when the search begins"
    scores = Scores.load(preparation.run)
    refuse_other_scores(preparation.run, scores, preparation.source.fingerprint(), preparation.asked.model)
    return f"{scores.metric}, in {preparation.run / SCORES_FILE}"


def _tokenizer(preparation: Preparation) -> str:
    bos = preparation.bos
    if preparation.recipe.repair.sampled_windows and bos is None:
        first_token(preparation.tokenizer, preparation.source.name, NO_SAMPLED_WINDOWS)
    return f"{len(preparation.tokenizer):,} tokens, windows begin {'without' if bos is None else 'with'} BOS"


def _text(preparation: Preparation) -> str:
    text = preparation.text
    return (
        f"{preparation.asked.calibration.corpus}, {len(text.search):,} windows to search over and "
        f"{len(text.heldout):,} held out"
    )


def _asked_device(preparation: Preparation) -> str:
    return f"{preparation.asked.device}, dtype {preparation.asked.dtype}"


def _asked_corpus(preparation: Preparation) -> str:
    return preparation.asked.calibration.corpus


def _run_directory(preparation: Preparation) -> str:
    return str(preparation.run)


CHECKS: tuple[Check, ...] = (
    Check("device", _device, "machine", _asked_device, estimate=True),
    Check("directory", _directory, "machine", _run_directory),
    Check("run", _run, "machine", _run_directory, scoring=False),
    Check("model", _model, "config", estimate=True),
    Check("windows", _windows, "config", estimate=True),
    Check("budget", _budget, "config", estimate=True),
    Check("format", _format, "config"),
    Check("weights", _weights, "model"),
    Check("scores", _scores, "model", _run_directory, scoring=False),
    Check("tokenizer", _tokenizer, "model", scoring=False),
    Check("text", _text, "model", _asked_corpus, scoring=False),
)
"""The checks in the order in which a search makes them, the quick ones first."""

ESTIMATE_CHECKS = tuple(check for check in CHECKS if check.estimate)
SCORING_CHECKS = tuple(
    replace(check, find=_run_to_score) if check.name == "run" else check
    for check in CHECKS
    if check.scoring or check.name == "run"
)
