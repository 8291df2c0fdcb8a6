"""From a recipe to units, costs and a budget, and what a model's sizes make impossible."""

from pathlib import Path

import torch
from helpers.contexts import context_of
from helpers.messages import refused
from helpers.models import tiny_model

from pgprune_cli.core.projection import hard_mask
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.recipe.schema import BudgetSettings, CalibrationSettings, Recipe, UnitsSettings
from pgprune_cli.search import costs
from pgprune_cli.search.budget import budget_for

MODEL = PrunableModel.of(tiny_model("llama-gqa"))


def recipe_with(families: tuple[str, ...] = ("attention", "ffn"), **budget) -> Recipe:
    return Recipe(
        model="demo",
        calibration=CalibrationSettings(corpus="demo"),
        units=UnitsSettings(families=families),
        budget=BudgetSettings(**{"sparsity": 0.5, "scope": "per-family"} | budget),
    )


def test_parameters_are_what_a_budget_counts_unless_it_says_otherwise(tmp_path: Path) -> None:
    space, budget = budget_for(context_of(recipe_with(), MODEL, tmp_path))
    assert space == MODEL.shape.space(("attention", "ffn"))
    assert [c.kept for c in budget] == [4 * 4 * 1536 // 2, 4 * 24 * 96 // 2]
    assert list(tmp_path.iterdir()) == []


def test_flops_and_kv_cache_are_counted_at_the_context(tmp_path: Path) -> None:
    at = {"families": ("attention",), "context": 64}
    space, _ = budget_for(context_of(recipe_with(measure="flops", **at), MODEL, tmp_path))
    assert space.pair_costs.tolist() == list(costs.flops(MODEL, 64)["attention"])
    space, _ = budget_for(context_of(recipe_with(measure="kv-cache", **at), MODEL, tmp_path))
    assert space.pair_costs.tolist() == list(costs.kv_cache(MODEL, 64)["attention"])


def test_latency_is_measured_into_the_run_directory(tmp_path: Path) -> None:
    recipe = recipe_with(measure="latency", context=16)
    space, budget = budget_for(context_of(recipe, MODEL, tmp_path))
    assert (tmp_path / costs.COSTS_FILE).exists()
    assert budget_for(context_of(recipe, MODEL, tmp_path)) == (space, budget)


def test_limits_reach_the_masks(tmp_path: Path) -> None:
    recipe = recipe_with(min_keep=0.25, ffn_multiple=8, scope="global")
    space, budget = budget_for(context_of(recipe, MODEL, tmp_path))
    theta = torch.zeros(space.n, dtype=torch.float64)
    theta[space.slice_of("attention")] = 1.0
    mask = hard_mask(theta, space, budget)
    assert [int(part.sum()) for part in space.per_layer(mask, "ffn")] == [8, 8, 8, 8]
    assert int(mask[space.slice_of("attention")].sum()) == 9  # of 1,536 each: half of 33,792, less 32 channels


def refuse(*facts: str, **budget) -> None:
    """Fail unless the budget is refused with a message that holds these facts."""
    with refused(*facts):
        budget_for(context_of(recipe_with(**budget), MODEL, Path("nowhere")))


def test_whole_units_of_min_keep_exceed_the_budget() -> None:
    refuse("budget.min_keep", "0.3", "50.0%", "(attention)", "0.7", "30.0%", sparsity=0.7, min_keep=0.3)
    refuse("0.4", "multiples of 16", "54.5%", "(all)", "50.0%", min_keep=0.4, ffn_multiple=16, scope="global")


def test_multiple_is_too_coarse_for_the_model_or_the_budget() -> None:
    refuse("budget.ffn_multiple", "64", "24 channels", ffn_multiple=64)
    refuse("budget.ffn_multiple", "20 channels", "0.85", ffn_multiple=20, sparsity=0.85)


def test_in_a_budget_for_every_layer_each_pays_for_itself(tmp_path: Path) -> None:
    space, budget = budget_for(
        context_of(recipe_with(scope="per-layer", ffn_multiple=8, min_keep=0.3), MODEL, tmp_path)
    )
    mask = hard_mask(torch.linspace(0, 1, space.n, dtype=torch.float64), space, budget)
    widths = [int(part.sum()) for name in ("attention", "ffn") for part in space.per_layer(mask, name)]
    assert widths == [2, 2, 2, 2, 8, 8, 8, 8]
    refuse("budget.ffn_multiple", "16 channels", scope="per-layer", ffn_multiple=16)
    refuse("(attention of layer 0)", scope="per-layer", sparsity=0.7, min_keep=0.3)


def test_a_multiple_of_channels_does_not_matter_where_none_are_pruned(tmp_path: Path) -> None:
    recipe = recipe_with(ffn_multiple=64, families=("attention",))
    _, budget = budget_for(context_of(recipe, MODEL, tmp_path))
    assert budget.multiples == (1, 1, 1, 1)
