"""The search job: what it decides, that it resumes bit for bit, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.messages import refused
from helpers.models import save_tokenizer, tiny_model
from helpers.recipes import WIDTH_SEARCH
from helpers.searches import PowerCut, after_step, cut_power
from helpers.units import group_units

from pgprune_cli.core.policy import starting_theta
from pgprune_cli.core.projection import hard_mask
from pgprune_cli.core.space import budget_of
from pgprune_cli.errors import RunError, UserError
from pgprune_cli.forward import masked as masked
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.jobs.init_scores import init_scores
from pgprune_cli.jobs.search import search
from pgprune_cli.model.loading import load_prunable, load_tokenizer
from pgprune_cli.model.source import resolve
from pgprune_cli.recipe.reader import find, load
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.run import settled as settling
from pgprune_cli.run.checkpoint import latest_checkpoint
from pgprune_cli.run.decision import Decision
from pgprune_cli.run.interruption import Interrupted
from pgprune_cli.run.layout import (
    CHECKPOINTS_FOLDER,
    DECISION_MASKS,
    DECISION_RECORD,
    METRICS_FILE,
    RECIPE_FILE,
    REPAIR_FILE,
    SCORES_FILE,
)
from pgprune_cli.run.scores import Scores
from pgprune_cli.scores.metrics import flat_scores
from pgprune_cli.search import preparation
from pgprune_cli.search.loop import BAD_STEPS
from pgprune_cli.search.preparation import Preparation
from pgprune_cli.search.problem import Problem
from pgprune_cli.search.texts import repair_batches, scoring_batches

STEPS = 6
TIMING = ("seconds", "tokens_per_second", "memory_bytes")


def rows_of(run: Path) -> list[dict]:
    """The rows of the history without what a clock or the machine says."""
    rows = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def result_of(run: Path) -> tuple[bytes, list[dict], list[float]]:
    """The masks, the history and θ: all that must not depend on interruptions."""
    return (run / DECISION_MASKS).read_bytes(), rows_of(run), latest_checkpoint(run).state.theta.tolist()


def kill_self(signum: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


@pytest.fixture
def small(small):
    """By wanda-sp, if nothing else is said: obs takes as long as all else in a small search."""
    return lambda *overrides: small("scores.metric=wanda-sp", *overrides)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, token_cache: str):
    """The uninterrupted search of a recipe, done once for each."""
    done: dict[Recipe, tuple] = {}

    def run_of(recipe: Recipe) -> tuple:
        if recipe not in done:
            run = tmp_path_factory.mktemp("whole")
            search(recipe, run)
            done[recipe] = result_of(run)
        return done[recipe]

    return run_of


# --- resuming


@pytest.mark.parametrize("estimator", ["rloo", "paper"])
@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_search_stopped_at_any_step_ends_as_if_it_never_was(step, estimator, small, whole, tmp_path) -> None:
    recipe = small(f"search.estimator={estimator}")
    signum = (signal.SIGINT, signal.SIGTERM)[step % 2]
    with after_step(step, kill_self(signum)), pytest.raises(Interrupted) as stopped:
        search(recipe, tmp_path)
    assert (stopped.value.signum, stopped.value.step) == (signum, step)
    assert not (tmp_path / DECISION_RECORD).exists()
    search(recipe, tmp_path)
    assert result_of(tmp_path) == whole(recipe)


def test_a_search_stopped_at_every_step_ends_as_if_it_never_was(small, whole, tmp_path) -> None:
    for step in range(1, STEPS):
        with after_step(step, kill_self(signal.SIGINT)), pytest.raises(Interrupted):
            search(small(), tmp_path)
    search(small(), tmp_path)
    assert result_of(tmp_path) == whole(small())


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_power_cut_costs_only_the_steps_since_the_last_checkpoint(step, small, whole, tmp_path) -> None:
    recipe = small("search.checkpoint_every=2")
    with after_step(step, cut_power), pytest.raises(PowerCut):
        search(recipe, tmp_path)
    saved = latest_checkpoint(tmp_path)
    assert (saved.state.step if saved else 0) == (step - 1) // 2 * 2
    search(recipe, tmp_path)
    assert result_of(tmp_path) == whole(small())


def test_a_stop_in_the_last_step_is_a_stop_too(small, whole, tmp_path) -> None:
    """The repair behind it may take long, and a comparison has other searches to come."""
    with after_step(STEPS, kill_self(signal.SIGINT)), pytest.raises(Interrupted):
        search(small(), tmp_path)
    search(small(), tmp_path)
    assert result_of(tmp_path) == whole(small())


def test_the_signals_mean_what_they_meant_before(small, tmp_path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with after_step(1, kill_self(signal.SIGTERM)), pytest.raises(Interrupted):
        search(small(), tmp_path)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_finished_run_answers_without_a_model(small, tmp_path, monkeypatch) -> None:
    first = search(small(), tmp_path)
    monkeypatch.setattr("pgprune_cli.jobs.search.load_prunable", None)
    again = search(small(), tmp_path)
    assert again.heldout_loss == first.heldout_loss
    for left, right in zip(again.model_mask, first.model_mask, strict=True):
        assert torch.equal(left.attention, right.attention)
        assert torch.equal(left.ffn, right.ffn)


def test_a_run_keeps_the_fastest_dtype_of_the_machine_that_began_it(small, tmp_path, monkeypatch) -> None:
    recipe = small("dtype=fastest", "search.forward_passes=4")
    monkeypatch.setattr(settling, "fastest_dtype", lambda _: "bfloat16")
    with after_step(1, kill_self(signal.SIGINT)), pytest.raises(Interrupted):
        search(recipe, tmp_path)
    assert load(tmp_path / RECIPE_FILE).dtype == "bfloat16"

    monkeypatch.setattr(settling, "fastest_dtype", lambda _: "float32")  # another machine
    assert settling.settled(recipe).dtype == "float32"
    finished = search(recipe, tmp_path)
    assert "dtype: bfloat16" in finished.recipe
    assert search(recipe, tmp_path).recipe == finished.recipe


@pytest.mark.parametrize("policy", [(), WIDTH_SEARCH])
def test_the_seconds_of_every_phase_are_recorded_in_order(policy, small, tmp_path) -> None:
    with after_step(1, kill_self(signal.SIGINT)), pytest.raises(Interrupted):
        search(small(*policy), tmp_path)
    before = latest_checkpoint(tmp_path).seconds
    phases = search(small(*policy), tmp_path).phases
    assert list(phases) == ["opening", "scores", "width table", "steps", "repair"]
    assert min(phases.values()) >= 0 and phases["steps"] > before > 0  # the steps of both starts
    assert search(small(*policy), tmp_path).phases == phases


def test_the_seed_decides(small, whole) -> None:
    assert whole(small("seed=1"))[2] != whole(small())[2]


# --- what is refused


@pytest.fixture
def stopped(small, tmp_path) -> Path:
    with after_step(2, kill_self(signal.SIGINT)), pytest.raises(Interrupted):
        search(small(), tmp_path)
    return tmp_path


def refuse(recipe: Recipe, run: Path, *facts: str) -> None:
    """Fail unless the search is refused with a message that holds these facts."""
    with refused(*facts):
        search(recipe, run)


def test_search_refuses_the_run_of_another_recipe(stopped, small) -> None:
    other = small("budget.sparsity=0.25", "search.forward_passes=14")
    refuse(other, stopped, str(stopped), "budget.sparsity: 0.5 → 0.25", "search.forward_passes: 12 → 14")


def test_search_refuses_the_finished_run_of_another_recipe(small, tmp_path) -> None:
    search(small(), tmp_path)
    refuse(small("seed=3"), tmp_path, "seed: 0 → 3")


def test_search_refuses_to_resume_with_another_bos(stopped, small) -> None:
    for bos in ("true", "false"):
        refuse(small(f"calibration.bos={bos}"), stopped, str(stopped), f"calibration.bos: auto → {bos}")


def test_windows_with_bos_cost_as_much_and_are_recorded(small, whole, tmp_path) -> None:
    recipe = small("calibration.bos=true")
    bos = load_tokenizer(resolve("demo")).bos_token_id
    text, plain = Preparation(recipe).text, Preparation(small()).text
    assert (text.search.shape, text.heldout.shape) == (plain.search.shape, plain.heldout.shape)
    for windows in (text.search, text.heldout, *scoring_batches(recipe, text), *repair_batches(recipe, text)):
        assert (windows[:, 0] == bos).all()
    decision = search(recipe, tmp_path / "run")
    assert decision.bos and Decision.load(tmp_path / "run").bos
    assert all(row["bos"] for row in rows_of(tmp_path / "run"))
    first = search(small(), tmp_path / "plain")
    assert not first.bos and not any(row["bos"] for row in rows_of(tmp_path / "plain"))
    assert first.calibration_forward_passes == decision.calibration_forward_passes
    assert first.heldout_loss != decision.heldout_loss
    with refused("calibration.bos: true → auto"):
        search(small(), tmp_path / "run")


def test_a_tokenizer_without_bos_is_refused_before_the_text_is_read(small, tmp_path, monkeypatch) -> None:
    tiny_model("llama-gqa").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model", bos_token=None)
    for name in ("calibration_text", "check_vocabulary"):
        monkeypatch.setattr(preparation, name, None)
    with refused(f"{tmp_path / 'model'}: ", "no BOS token"):
        search(small("calibration.bos=true", f"model={tmp_path / 'model'}"), tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_what_changes_no_result_may_change(stopped, small, whole) -> None:
    search(small("search.checkpoint_every=1", "evaluation.seqlen=[64]"), stopped)
    assert result_of(stopped) == whole(small())


def test_settings_of_the_recovery_may_change_while_a_search_is_stopped_and_after_it(stopped, small, whole) -> None:
    search(small("recover.tokens=5000"), stopped)
    again = search(small("recover.train=lora", "recover.corpus=elsewhere.txt"), stopped)
    assert result_of(stopped) == whole(small())
    assert again.steps == small().search.steps


def test_a_damaged_checkpoint_is_refused(stopped, small) -> None:
    (state,) = (stopped / CHECKPOINTS_FOLDER).glob("*/state.safetensors")
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    refuse(small(), stopped, "state.safetensors", "the checkpoint is corrupt")


def test_search_refuses_a_truncated_history(stopped, small) -> None:
    history = stopped / METRICS_FILE
    whole = history.read_bytes()
    history.write_bytes(whole[:-5])
    with pytest.raises(UserError) as error:
        search(small(), stopped)
    assert str(history) in str(error.value)
    assert f"{len(whole) - 5} bytes" in str(error.value)


def test_a_history_with_another_digit_is_refused(stopped, small) -> None:
    history = stopped / METRICS_FILE
    whole = history.read_text()
    history.write_text(whole.replace('"step": 1,', '"step": 7,'))
    refuse(small(), stopped, str(history), "damaged")
    history.write_text(whole + '{"step": 9')  # what was written after the checkpoint goes
    assert search(small(), stopped)


def test_scores_changed_under_a_search_are_refused(stopped, small) -> None:
    scores = Scores.load(stopped)
    scores.tensors["layers.0.ffn"] = scores.tensors["layers.0.ffn"].flip(0)
    scores.save(stopped)
    refuse(small(), stopped, str(stopped), "other scores or another model")


def test_scores_of_another_model_are_refused(small, tmp_path) -> None:
    scores = init_scores(small(), tmp_path)
    replace(scores, fingerprint="0" * 64).save(tmp_path)
    refuse(small(), tmp_path, SCORES_FILE, "another model", "pgprune init-scores")


# --- losses that are no numbers


@pytest.fixture
def broken_losses(monkeypatch):
    """Makes the losses of the search's masks bad as `how(call)` says; held-out losses stay."""

    def install(how: Callable[[int], list[float | None]]) -> None:
        original, calls = Evaluator.losses, []

        def losses(self, keeps, tokens, repaired=None):
            actual = original(self, keeps, tokens, repaired)
            if len(keeps) > 1:
                for index, value in enumerate(how(len(calls))):
                    if value is not None:
                        actual[index] = value
                calls.append(1)
            return actual

        monkeypatch.setattr(Evaluator, "losses", losses)

    return install


def test_bad_losses_are_skipped_and_counted(small, tmp_path, broken_losses) -> None:
    broken_losses(lambda call: [float("nan"), None, float("inf")] if call == 1 else [None])
    search(small("search.objective=loss", "search.masks_per_step=4", "search.forward_passes=24"), tmp_path)
    rows = rows_of(tmp_path)
    assert [row["skipped"] for row in rows] == [0, 0, 2, 2, 2, 2, 2]
    assert [loss is None for loss in rows[2]["losses"]] == [True, False, True, False]
    assert latest_checkpoint(tmp_path).state.theta.isfinite().all()


def test_a_search_whose_every_loss_is_bad_stops(small, tmp_path, broken_losses) -> None:
    broken_losses(lambda call: [float("nan")] * 2 if call >= 1 else [None])
    with refused(f"step {1 + BAD_STEPS}", f"{BAD_STEPS} steps", "float32", error=RunError):
        search(small("search.objective=loss", "search.forward_passes=60"), tmp_path)
    assert not (tmp_path / DECISION_RECORD).exists()


def test_a_search_goes_on_where_memory_runs_out(small, whole, tmp_path, monkeypatch) -> None:
    original = masked.summed_loss

    def summed_loss(model, tokens):
        if len(tokens) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, tokens)

    monkeypatch.setattr(masked, "summed_loss", summed_loss)
    search(small(), tmp_path)
    masks, rows, theta = whole(small())
    assert (tmp_path / DECISION_MASKS).read_bytes() == masks
    for row, expected in zip(rows_of(tmp_path), rows, strict=True):
        assert row["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert latest_checkpoint(tmp_path).state.theta.tolist() == pytest.approx(theta, abs=1e-4)


# --- what is decided


def policy_of(recipe: Recipe, run: Path):
    """The evaluator, the space, the budget and the starting θ, put together here once more. Of a unit search."""
    evaluator = Evaluator(load_prunable(resolve("demo"), "float32", "cpu"))
    space, units = group_units(evaluator.model.shape, recipe.units.families)
    budget = budget_of(space, recipe.budget.sparsity, recipe.budget.scope)
    loaded = Scores.load(run)
    scores = flat_scores(loaded.tensors, space, units, evaluator.model.shape.grids, loaded.metric)
    return evaluator, space, budget, starting_theta(scores, space, budget, "sigmap", recipe.start.temperature)


def test_without_steps_the_metric_decides(small, tmp_path) -> None:
    recipe = small("search.forward_passes=0")
    decision = search(recipe, tmp_path)
    evaluator, space, budget, theta = policy_of(recipe, tmp_path)
    _, units = group_units(evaluator.model.shape, recipe.units.families)
    expected = evaluator.model.shape.model_mask(space, hard_mask(theta, space, budget), units)
    for left, right in zip(decision.model_mask, expected, strict=True):
        assert torch.equal(left.attention, right.attention)
        assert torch.equal(left.ffn, right.ffn)
    assert (decision.steps, decision.forward_passes) == (0, 0)


def test_the_heldout_loss_is_the_hard_masks_on_text_never_searched(small, tmp_path) -> None:
    decision = search(small(), tmp_path)
    text = Preparation(small()).text
    evaluator = Evaluator(load_prunable(resolve("demo"), "float32", "cpu"))
    with evaluator.shrunk(decision.model_mask) as model, torch.inference_mode():
        loss = model(input_ids=text.heldout, labels=text.heldout).loss
    with torch.inference_mode():
        dense = evaluator.model.module(input_ids=text.heldout, labels=text.heldout).loss
    assert decision.heldout_loss == pytest.approx(loss.item(), rel=1e-5)
    assert decision.dense_loss == pytest.approx(dense.item(), rel=1e-5)
    evaluated = {row["step"]: row["heldout_loss"] for row in rows_of(tmp_path)}
    assert evaluated[decision.best_step] == decision.heldout_loss
    assert decision.forward_passes == 2 * STEPS


@pytest.mark.parametrize("scope", ["per-family", "global"])
@pytest.mark.parametrize("sparsity", [0.2, 0.5])
@pytest.mark.parametrize("families", ["[attention, ffn]", "[ffn]", "[attention-block, ffn-block]", "[layer]"])
def test_the_budget_is_met_within_one_unit(families, sparsity, scope, small, tmp_path) -> None:
    recipe = small(
        f"units.families={families}", f"budget.sparsity={sparsity}", f"budget.scope={scope}", "search.forward_passes=4"
    )
    decision = search(recipe, tmp_path)
    _, space, _, _ = policy_of(recipe, tmp_path)
    groups = [space.slice_of(family.name) for family in space.families]
    for units in groups if scope == "per-family" else [slice(0, space.n)]:
        total = int(space.costs[units].sum())
        kept = total - removed_of(decision, recipe, space, units)
        room = (1 - sparsity) * total - kept
        assert -1e-6 * total <= room < int(space.costs[units].max())


def test_sparsity_is_of_parameters_whatever_the_budget_is_of(small, tmp_path) -> None:
    recipe = small("budget.measure=flops", "budget.scope=global", "budget.context=4096", "search.forward_passes=4")
    decision = search(recipe, tmp_path)
    _, parameters, _, _ = policy_of(recipe, tmp_path)
    removed = removed_of(decision, recipe, parameters, slice(0, parameters.n))
    assert decision.sparsity == pytest.approx(removed / int(parameters.costs.sum()))
    assert decision.budget["measure"] == "flops"
    assert 0.48 < decision.budget["kept"] <= 0.5
    assert abs(decision.sparsity - 0.5) > 0.02  # FLOPs of attention grow with the context, and its parameters do not


def test_a_latency_is_measured_once_in_a_run(small, tmp_path, monkeypatch) -> None:
    """Were it measured again, the budget would be another one, and the search not the one that was stopped."""
    recipe = small("budget.measure=latency", "budget.context=32")
    with after_step(2, kill_self(signal.SIGINT)), pytest.raises(Interrupted):
        search(recipe, tmp_path)
    monkeypatch.setattr("pgprune_cli.search.costs.measure_latency", None)
    decision = search(recipe, tmp_path)
    assert decision.budget["measure"] == "latency"
    assert 0.4 < decision.budget["kept"] <= 0.5


def removed_of(decision, recipe: Recipe, space, units: slice) -> int:
    """Parameters gone of the families whose units lie in a slice, counted layer by layer from the decision."""
    gone = 0
    for family in space.families:
        span = space.slice_of(family.name)
        if span.start < units.start or span.stop > units.stop:
            continue
        costs = space.per_layer(space.costs, family.name)
        for layer, cost in zip(decision.model_mask, costs, strict=True):
            masks = {
                "attention": ~layer.attention.view(len(cost), -1).any(1) if family.name == "attention" else None,
                "ffn": ~layer.ffn,
                "attention-block": ~layer.attention.any().reshape(1),
                "ffn-block": ~layer.ffn.any().reshape(1),
                "layer": ~layer.ffn.any().reshape(1),
            }
            gone += int(cost[masks[family.name]].sum())
    return gone


def test_scores_are_made_where_there_are_none_and_taken_where_there_are(small, tmp_path) -> None:
    alone, after = tmp_path / "alone", tmp_path / "after"
    search(small(), alone)
    init_scores(small(), after)
    search(small(), after)
    assert result_of(alone) == result_of(after)
    for name, values in Scores.load(alone).tensors.items():
        assert torch.equal(values, Scores.load(after).tensors[name])


def test_the_metric_that_made_the_scores_is_what_is_recorded(small, tmp_path) -> None:
    init_scores(small("scores.metric=magnitude"), tmp_path)
    decision = search(small(), tmp_path)
    assert "metric: magnitude" in decision.recipe
    assert "metric: magnitude" in (tmp_path / "recipe.yaml").read_text()
    assert search(small(), tmp_path).recipe == decision.recipe  # finished: it answers as it did


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in (1, 2))])
def test_the_shipped_demo_search_beats_the_metric_alone(seed, tmp_path) -> None:
    """The whole recipe of `make demo`. Measured: from 1.486 to 1.037 nats per token with the seeds 0, 1 and 2."""
    alone = [f"seed={seed}", "search.forward_passes=0", "search.policy=units", "repair.method=none"]
    metric_only = search(load(find("demo"), alone), tmp_path / "metric")
    (tmp_path / "searched").mkdir()
    shutil.copyfile(tmp_path / "metric" / SCORES_FILE, tmp_path / "searched" / SCORES_FILE)
    searched = search(load(find("demo"), [f"seed={seed}"]), tmp_path / "searched")
    assert searched.sparsity == pytest.approx(metric_only.sparsity, abs=1e-3)
    assert searched.heldout_loss < metric_only.heldout_loss - 0.3


# --- widths and repair

WIDTHS = ("search.policy=widths", "search.masks_per_step=4", "search.forward_passes=12", "repair.method=least-squares")
WIDTHS += ("repair.windows=8", "calibration.windows=24", "scores.metric=obs")


@pytest.mark.parametrize(("step", "objective"), [(1, "kl"), (2, "loss"), (3, "kl-hidden")])
def test_a_search_over_widths_resumes_bit_for_bit_and_repairs_the_same(step, objective, small, tmp_path) -> None:
    """The third step is the last: what is left is the decision, measured on the model as it was loaded."""
    recipe = small(*WIDTHS, f"search.objective={objective}")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    first = search(recipe, whole)
    with after_step(step, kill_self(signal.SIGINT)), pytest.raises(Interrupted):
        search(recipe, cut)
    second = search(recipe, cut)
    assert rows_of(cut) == rows_of(whole)
    for name in (DECISION_MASKS, REPAIR_FILE):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert (second.heldout_loss, second.heldout_objective) == (first.heldout_loss, first.heldout_objective)
    assert first.forward_passes == 12
    assert first.calibration_forward_passes > 0


def test_masks_that_repeat_in_a_step_run_once(small, tmp_path, monkeypatch) -> None:
    """The same width in every layer leaves one mask to draw."""
    losses, counts = Problem.losses, []

    def counted(self: Problem, masks: torch.Tensor, position: int) -> torch.Tensor:
        counts.append(len(masks))
        return losses(self, masks, position)

    monkeypatch.setattr(Problem, "losses", counted)
    search(small(*WIDTHS, "budget.scope=per-layer", "repair.method=none"), tmp_path)
    assert counts == [1, 1, 1]
    assert [len(set(row["losses"])) for row in rows_of(tmp_path)] == [0, 1, 1, 1]
    assert all(len(row["losses"]) == 4 for row in rows_of(tmp_path)[1:])


@pytest.mark.parametrize("policy", ["units", "widths"])
def test_text_that_the_dense_model_writes_changes_the_repair_and_nothing_before_it(policy, small, tmp_path) -> None:
    def searched(name: str, *overrides: str) -> tuple[Decision, Path]:
        run = tmp_path / name
        return search(small(*WIDTHS, f"search.policy={policy}", *overrides), run), run

    (plain, without), (first, run), (_, again) = (
        searched(name, f"repair.sampled_windows={count}") for name, count in (("none", 0), ("one", 6), ("two", 6))
    )
    assert rows_of(run) == rows_of(without)
    assert (run / REPAIR_FILE).read_bytes() == (again / REPAIR_FILE).read_bytes()
    assert (run / DECISION_MASKS).read_bytes() == (again / DECISION_MASKS).read_bytes()
    assert (run / REPAIR_FILE).read_bytes() != (without / REPAIR_FILE).read_bytes()
    assert first.calibration_forward_passes > plain.calibration_forward_passes
    assert first.sparsity == pytest.approx(plain.sparsity, abs=1e-9)


def test_a_model_that_cannot_begin_a_document_is_refused_before_the_text_is_read(small, tmp_path, monkeypatch) -> None:
    tiny_model("llama-gqa").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    monkeypatch.setattr(preparation, "calibration_text", None)
    tokenizer = load_tokenizer(resolve(str(tmp_path / "model")))
    tokenizer.bos_token = tokenizer.eos_token = None
    monkeypatch.setattr(preparation, "load_tokenizer", lambda source: tokenizer)
    monkeypatch.setattr("pgprune_cli.data.tokens.SEPARATOR", "<none>")
    with refused(f"{tmp_path / 'model'}: ", "neither <none> nor BOS nor EOS", "sampled_windows to 0"):
        search(
            small("repair.method=least-squares", "repair.sampled_windows=1", f"model={tmp_path / 'model'}"), tmp_path
        )


def test_the_repair_lowers_the_loss_and_is_what_the_decision_carries(small, tmp_path) -> None:
    # of fewer windows it learns too much by heart
    enough = ("search.policy=units", "search.forward_passes=0", "calibration.windows=132", "scores.metric=obs")
    plain = search(small(*enough), tmp_path / "plain")
    recipe = small(*enough, "repair.method=least-squares")
    repaired = search(recipe, tmp_path / "repaired")
    assert repaired.heldout_loss < plain.heldout_loss
    assert (repaired.sparsity, repaired.budget) == (plain.sparsity, plain.budget)
    for left, right in zip(repaired.model_mask, plain.model_mask, strict=True):  # the units that were searched
        assert torch.equal(left.attention, right.attention) and torch.equal(left.ffn, right.ffn)
    again = Decision.load(tmp_path / "repaired").repaired
    assert again.keys() == repaired.repaired.keys() != set()
    assert all(torch.equal(again[key].weight, repaired.repaired[key].weight) for key in again)
    evaluator = Evaluator(load_prunable(resolve("demo"), "float32", "cpu"))
    heldout = Preparation(recipe).text.heldout
    with evaluator.shrunk(Decision.load(tmp_path / "repaired").model_mask, again) as model, torch.inference_mode():
        assert model(input_ids=heldout, labels=heldout).loss.item() == pytest.approx(repaired.heldout_loss, rel=1e-5)
    (tmp_path / "repaired" / REPAIR_FILE).write_bytes(b"cut")
    with pytest.raises(UserError, match="missing, damaged, or not the repair"):
        Decision.load(tmp_path / "repaired")


def test_a_search_over_widths_leaves_the_choice_of_units_to_the_repair(small, tmp_path) -> None:
    kept = {}
    for method in ("none", "least-squares"):
        layers = ("search.policy=widths", "search.forward_passes=0", "scores.metric=obs")
        recipe = small(*layers, f"repair.method={method}")
        decision = search(recipe, tmp_path / method)
        scores = Scores.load(tmp_path / method).tensors
        channels = {f"layers.{index}.ffn": layer.ffn for index, layer in enumerate(decision.model_mask)}
        kept[method] = all(mask[scores[name].topk(int(mask.sum())).indices].all() for name, mask in channels.items())
    assert kept == {"none": True, "least-squares": False}


@pytest.mark.parametrize("measure", ["parameters", "latency"])
def test_search_accepts_the_corrected_recipe_after_a_budget_that_the_model_cannot_meet(
    measure, small, tmp_path
) -> None:
    """Nothing is written before the budget is checked, except the scores if a latency must be measured first."""
    impossible = small(
        f"budget.measure={measure}", "budget.context=32", "budget.sparsity=0.8", "budget.ffn_multiple=512"
    )
    refuse(impossible, tmp_path, "budget.ffn_multiple")
    assert {path.name for path in tmp_path.iterdir()} == ({SCORES_FILE} if measure == "latency" else set())
    corrected = small(f"budget.measure={measure}", "budget.context=16", "budget.sparsity=0.8")
    assert search(corrected, tmp_path).budget["measure"] == measure
