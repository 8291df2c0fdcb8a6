"""From a recipe to units, costs and a budget, and what a model's sizes make impossible."""

from pathlib import Path

import pytest
import torch
from helpers.models import tiny_model

from pgprune_cli.core.projection import hard_mask
from pgprune_cli.errors import UserError
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.recipe.schema import Budget, Calibration, Recipe, Units
from pgprune_cli.search import costs
from pgprune_cli.search.budget import budget_for

EVALUATOR = Evaluator(PrunableModel.of(tiny_model("llama-gqa")))


def recipe_with(families: tuple[str, ...] = ("attention", "ffn"), **budget) -> Recipe:
    return Recipe(
        model="demo",
        calibration=Calibration(corpus="demo"),
        units=Units(families=families),
        budget=Budget(**{"sparsity": 0.5, "scope": "per-family"} | budget),
    )


def test_parameters_are_what_a_budget_counts_unless_it_says_otherwise(tmp_path: Path) -> None:
    space, budget = budget_for(recipe_with(), EVALUATOR, tmp_path, "abc")
    assert space == EVALUATOR.shape.space(("attention", "ffn"))
    assert [c.kept for c in budget] == [4 * 4 * 1536 // 2, 4 * 24 * 96 // 2]
    assert list(tmp_path.iterdir()) == []


def test_flops_and_kv_cache_are_counted_at_the_context(tmp_path: Path) -> None:
    at = {"families": ("attention",), "context": 64}
    space, _ = budget_for(recipe_with(of="flops", **at), EVALUATOR, tmp_path, "abc")
    assert space.pair_costs.tolist() == list(costs.flops(EVALUATOR.model, 64).attention)
    space, _ = budget_for(recipe_with(of="kv-cache", **at), EVALUATOR, tmp_path, "abc")
    assert space.pair_costs.tolist() == list(costs.kv_cache(EVALUATOR.model, 64).attention)


def test_latency_is_measured_into_the_run_directory(tmp_path: Path) -> None:
    recipe = recipe_with(of="latency", context=16)
    space, budget = budget_for(recipe, EVALUATOR, tmp_path, "abc")
    assert (tmp_path / costs.COSTS_FILE).exists()
    assert budget_for(recipe, EVALUATOR, tmp_path, "abc") == (space, budget)


def test_limits_reach_the_masks(tmp_path: Path) -> None:
    recipe = recipe_with(min_keep=0.25, ffn_multiple=8, scope="global")
    space, budget = budget_for(recipe, EVALUATOR, tmp_path, "abc")
    theta = torch.zeros(space.n, dtype=torch.float64)
    theta[space.slice_of("attention")] = 1.0
    mask = hard_mask(theta, space, budget)
    assert [int(part.sum()) for part in space.per_layer(mask, "ffn")] == [8, 8, 8, 8]
    assert int(mask[space.slice_of("attention")].sum()) == 9  # of 1,536 each: half of 33,792, less 32 channels


def refusal(**budget) -> str:
    with pytest.raises(UserError) as error:
        budget_for(recipe_with(**budget), EVALUATOR, Path("nowhere"), "abc")
    return str(error.value)


def test_whole_units_may_be_more_than_the_budget_leaves() -> None:
    assert refusal(sparsity=0.7, min_keep=0.3) == (
        "budget.min_keep: 0.3 of every layer, in whole units, comes to 50.0% of the parameters (attention), "
        "and budget.sparsity 0.7 leaves 30.0%; lower one of them"
    )
    assert refusal(min_keep=0.4, ffn_multiple=16, scope="global") == (
        "budget.min_keep: 0.4 of every layer, in whole units and multiples of 16, comes to 54.5% of the "
        "parameters (all), and budget.sparsity 0.5 leaves 50.0%; lower one of them"
    )


def test_a_multiple_may_be_too_coarse_for_the_model_or_for_the_budget() -> None:
    assert refusal(ffn_multiple=64) == ("budget.ffn_multiple: 64 is more than the 24 channels of a layer; lower it")
    assert refusal(ffn_multiple=20, sparsity=0.85) == (
        "budget.ffn_multiple: not even 20 channels of one layer fit into what budget.sparsity 0.85 leaves; "
        "lower one of them"
    )


def test_in_a_budget_for_every_layer_each_pays_for_itself(tmp_path: Path) -> None:
    space, budget = budget_for(recipe_with(scope="per-layer", ffn_multiple=8, min_keep=0.3), EVALUATOR, tmp_path, "abc")
    mask = hard_mask(torch.linspace(0, 1, space.n, dtype=torch.float64), space, budget)
    widths = [int(part.sum()) for name in ("attention", "ffn") for part in space.per_layer(mask, name)]
    assert widths == [2, 2, 2, 2, 8, 8, 8, 8]
    assert refusal(scope="per-layer", ffn_multiple=16).startswith("budget.ffn_multiple: not even 16 channels")
    assert "(attention of layer 0)" in refusal(scope="per-layer", sparsity=0.7, min_keep=0.3)


def test_a_multiple_of_channels_does_not_matter_where_none_are_pruned(tmp_path: Path) -> None:
    recipe = recipe_with(ffn_multiple=64, families=("attention",))
    _, budget = budget_for(recipe, EVALUATOR, tmp_path, "abc")
    assert budget.multiples == (1, 1, 1, 1)
