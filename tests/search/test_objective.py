"""What a search minimises, and that it writes the best decision that it evaluated on held-out text."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from helpers.contexts import context_of
from helpers.masks import MODEL_MASKS, random_repair, random_tokens
from helpers.models import tiny_model
from helpers.recipes import WIDTH_SEARCH
from helpers.searches import after_step

from pgprune_cli.data.windows import CalibrationText
from pgprune_cli.forward.divergence import HIDDEN_WEIGHT, Divergence
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.jobs.search import search
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.run.checkpoint import latest_checkpoint
from pgprune_cli.run.decision import Decision
from pgprune_cli.run.history import read_history
from pgprune_cli.run.interruption import Interrupted
from pgprune_cli.run.layout import DECISION_MASKS
from pgprune_cli.search.objective import Objective

OBJECTIVES = ("loss", "kl", "kl-hidden")
POLICIES = {"units": ("search.learning_rate=0.5",), "widths": WIDTH_SEARCH}


def best_of(run: Path) -> int:
    """Return the step whose decision had the lowest objective on held-out text, the first of equal ones."""
    rows = [row for row in read_history(run) if row.heldout_objective is not None]
    return min(rows, key=lambda row: row.heldout_objective).step


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_heldout_values_are_means_over_all_windows(objective: str, small, tmp_path) -> None:
    """Five windows make batches of 2, 2 and 1."""
    recipe = small(f"search.objective={objective}", "calibration.batch=2")
    model, tokens = PrunableModel.of(tiny_model("llama-gqa")), random_tokens(rows=5)
    context = context_of(recipe, model, tmp_path, CalibrationText(tokens, tokens, tokens.flatten()))
    model_mask = MODEL_MASKS["random"](model.module)
    repaired = random_repair(model.module, model_mask, bias=False)
    heldout = Objective(context).on_heldout(model_mask, repaired)
    loss = float(Evaluator(model).losses([model_mask], tokens, [repaired]))
    divergence = Divergence(Evaluator(model), HIDDEN_WEIGHT if objective == "kl-hidden" else 0.0)
    values = divergence.values([model_mask], tokens, [repaired], divergence.dense_states(tokens))
    assert heldout.loss == pytest.approx(loss, rel=1e-5)
    assert heldout.objective == pytest.approx(loss if objective == "loss" else float(values.objective), rel=1e-5)
    one_batch = small(f"search.objective={objective}", "calibration.batch=5")
    step = Objective(context_of(one_batch, model, tmp_path, context.text)).values([model_mask], 0, [repaired])
    assert float(step) == pytest.approx(heldout.objective, rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("policy", POLICIES)
def test_the_written_decision_is_the_best_one_evaluated(policy: str, objective: str, small, tmp_path) -> None:
    recipe = [*POLICIES[policy], f"search.objective={objective}", "search.evaluate_every=1"]
    decision = search(small(*recipe), tmp_path / "whole")
    rows = read_history(tmp_path / "whole")
    assert [row.step for row in rows] == list(range(decision.steps + 1))
    assert all(row.heldout_objective is not None for row in rows)
    assert decision.best_step == best_of(tmp_path / "whole")
    if policy == "units":  # what was evaluated is what is written
        best = rows[decision.best_step]
        assert (decision.heldout_objective, decision.heldout_loss) == (best.heldout_objective, best.heldout_loss)
    if objective == "loss":
        assert decision.heldout_objective == decision.heldout_loss
    passes = decision.best_step * small(*recipe).search.masks_per_step
    if policy == "widths":  # a width search has no schedule, so it can end at any step
        search(small(*recipe, f"search.forward_passes={passes}"), tmp_path / "short")
        masks = [(tmp_path / run / DECISION_MASKS).read_bytes() for run in ("whole", "short")]
        assert masks[0] == masks[1]


def test_without_an_evaluation_the_last_decision_is_written(small, tmp_path) -> None:
    decision = search(small("search.forward_passes=0"), tmp_path)
    assert decision.best_step is None
    assert read_history(tmp_path) == []


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_stopped_search_remembers_the_best_decision(policy: str, objective: str, small, tmp_path) -> None:
    recipe = small(*POLICIES[policy], f"search.objective={objective}", "search.evaluate_every=1")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    first = search(recipe, whole)
    for step in (1, 4):
        with after_step(step, lambda: os.kill(os.getpid(), signal.SIGINT)), pytest.raises(Interrupted):
            search(recipe, cut)
    second = search(recipe, cut)
    left, right = (latest_checkpoint(run).best for run in (whole, cut))
    assert (left.step, left.objective) == (right.step, right.objective)
    assert torch.equal(left.centre, right.centre)
    assert (cut / DECISION_MASKS).read_bytes() == (whole / DECISION_MASKS).read_bytes()
    assert (first.best_step, first.heldout_objective) == (second.best_step, second.heldout_objective)
    assert Decision.load(cut, with_repair=False).best_step == first.best_step


@pytest.mark.parametrize(("steps", "every", "evaluated"), [(16, 0, 9), (20, 0, 8), (3, 0, 4), (1000, 0, 9), (20, 7, 4)])
def test_a_search_evaluates_the_start_the_end_and_about_eight_times(steps, every, evaluated, small) -> None:
    recipe = small(f"search.forward_passes={2 * steps}", "search.masks_per_step=2", f"search.evaluate_every={every}")
    due = [step for step in range(steps + 1) if recipe.search.evaluates(step)]
    assert (due[0], due[-1], len(due)) == (0, steps, evaluated)


@pytest.mark.parametrize("objective", ["kl", "kl-hidden"])
def test_the_dense_forward_passes_are_counted(objective: str, small, tmp_path) -> None:
    plain = search(small("search.objective=loss"), tmp_path / "loss")
    diverging = search(small(f"search.objective={objective}"), tmp_path / "kl")
    assert diverging.forward_passes == plain.forward_passes
    assert diverging.calibration_forward_passes == plain.calibration_forward_passes + plain.steps
