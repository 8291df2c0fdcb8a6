"""From a recipe to units, costs and a budget, and what a model's sizes make impossible."""

from pathlib import Path

import pytest
import torch
from helpers.contexts import context_of
from helpers.messages import refused
from helpers.models import tiny_model
from helpers.units import group_units, random_scores

from pgprune_cli.core.grid import chain_of_scores, unit_costs
from pgprune_cli.core.projection import hard_mask
from pgprune_cli.core.space import Budget, MaskSpace
from pgprune_cli.model.prunable import Partitions, PrunableModel
from pgprune_cli.recipe.schema import BudgetSettings, CalibrationSettings, Recipe, SearchSettings, UnitsSettings
from pgprune_cli.run.scores import Scores
from pgprune_cli.search import costs
from pgprune_cli.search.budget import budget_for, estimated_units

MODEL = PrunableModel.of(tiny_model("llama-gqa"))
SCORES = Scores(random_scores(MODEL.shape), "magnitude", "abc", MODEL.shape.unit_counts)
KV_HEAD = 4 * 8 * 32 + 2 * 8 * 32
"""Parameters of a KV head with its two query heads."""


def recipe_with(families: tuple[str, ...] = ("attention", "ffn"), policy: str = "units", **budget) -> Recipe:
    return Recipe(
        model="demo",
        calibration=CalibrationSettings(corpus="demo"),
        units=UnitsSettings(families=families),
        search=SearchSettings(policy=policy),
        budget=BudgetSettings(**{"sparsity": 0.5, "scope": "per-family"} | budget),
    )


def problem(recipe: Recipe, run: Path, scores: Scores = SCORES) -> tuple[MaskSpace, Budget, Partitions]:
    return budget_for(context_of(recipe, MODEL, run), scores)


def test_parameters_are_what_a_budget_counts_unless_it_says_otherwise(tmp_path: Path) -> None:
    space, budget, units = problem(recipe_with(), tmp_path)
    assert (space, units.keys()) == (group_units(MODEL.shape)[0], group_units(MODEL.shape)[1].keys())
    assert [c.kept for c in budget] == [4 * 4 * KV_HEAD // 2, 4 * 24 * 96 // 2]
    assert space.pair_counts.tolist() == [4] * 4 + [24] * 4
    assert list(tmp_path.iterdir()) == []


def test_a_width_search_has_the_steps_of_a_chain_as_units(tmp_path: Path) -> None:
    space, budget, units = problem(recipe_with(policy="widths"), tmp_path)
    assert space.pair_counts.tolist() == [5] * 4 + [24] * 4  # from (4, 2) down to (1, 1), and to nothing
    assert [c.total for c in budget] == [4 * 4 * KV_HEAD, 4 * 24 * 96]
    for layer in range(4):
        grid, cost = MODEL.shape.grids["attention"][layer], MODEL.shape.parameters["attention"][layer]
        scores = SCORES.tensors[f"layers.{layer}.attention"]
        assert torch.equal(units[layer, "attention"], chain_of_scores(scores, grid, cost))
        assert space.families[0].layer_costs(layer).tolist() == unit_costs(units[layer, "attention"], grid, cost)


@pytest.mark.parametrize("policy", ["units", "widths"])
def test_flops_and_kv_cache_are_counted_at_the_context(policy: str, tmp_path: Path) -> None:
    """All query heads of a KV head share its cache, so it is removed whole if only the cache counts."""
    at = {"families": ("attention",), "context": 64, "policy": policy}
    space, _, units = problem(recipe_with(measure="flops", **at), tmp_path)
    grid, (cost, *_) = MODEL.shape.grids["attention"][0], costs.flops(MODEL, 64)["attention"]
    assert space.families[0].layer_costs(0).tolist() == unit_costs(units[0, "attention"], grid, cost)
    assert int(space.costs.sum()) == 4 * cost.of_whole(grid)
    space, budget, units = problem(recipe_with(measure="kv-cache", **at), tmp_path)
    (head,) = {cost.group for cost in costs.kv_cache(MODEL, 64)["attention"]}
    assert space.costs.tolist() == [head] * 16
    assert units[0, "attention"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    mask = hard_mask(torch.linspace(0, 1, space.n, dtype=torch.float64), space, budget)
    model_mask = MODEL.shape.model_mask(space, mask, units)
    assert MODEL.shape.cost(costs.kv_cache(MODEL, 64), model_mask) == 8 * head


@pytest.mark.parametrize("policy", ["units", "widths"])
def test_latency_is_measured_into_the_run_directory(policy: str, tmp_path: Path) -> None:
    recipe = recipe_with(measure="latency", context=16, policy=policy)
    space, budget, units = problem(recipe, tmp_path)
    assert (tmp_path / costs.COSTS_FILE).exists()
    again = problem(recipe, tmp_path)
    assert again[:2] == (space, budget)
    assert all(torch.equal(again[2][key], partition) for key, partition in units.items())


def test_estimates_have_as_many_units_as_the_search(tmp_path: Path) -> None:
    for policy in ("units", "widths"):
        recipe = recipe_with(policy=policy)
        space, _, units = problem(recipe, tmp_path)
        estimated = estimated_units(recipe, MODEL.shape)
        assert {key: int(units[key].max()) for key in units} == {key: int(estimated[key].max()) for key in units}
        assert int(MODEL.shape.space(recipe.units.families, estimated).costs.sum()) == int(space.costs.sum())


def test_limits_reach_the_masks(tmp_path: Path) -> None:
    recipe = recipe_with(min_keep=0.25, ffn_multiple=8, scope="global")
    space, budget, _ = problem(recipe, tmp_path)
    theta = torch.zeros(space.n, dtype=torch.float64)
    theta[space.slice_of("attention")] = 1.0
    mask = hard_mask(theta, space, budget)
    assert [int(part.sum()) for part in space.per_layer(mask, "ffn")] == [8, 8, 8, 8]
    assert int(mask[space.slice_of("attention")].sum()) == 9  # of 1,536 each: half of 33,792, less 32 channels


def refuse(*facts: str, **budget) -> None:
    """Fail unless the budget is refused with a message that holds these facts."""
    with refused(*facts):
        problem(recipe_with(**budget), Path("nowhere"))


def test_whole_units_of_min_keep_exceed_the_budget() -> None:
    refuse("budget.min_keep", "0.3", "50.0%", "(attention)", "0.7", "30.0%", sparsity=0.7, min_keep=0.3)
    refuse("0.4", "multiples of 16", "54.5%", "(all)", "50.0%", min_keep=0.4, ffn_multiple=16, scope="global")


@pytest.mark.parametrize("policy", ["units", "widths"])
def test_the_first_and_last_layers_can_be_kept_whole(policy: str, tmp_path: Path) -> None:
    recipe = recipe_with(policy=policy, keep_first=0.5, keep_last=0.25, scope="global", sparsity=0.2)
    space, budget, _ = problem(recipe, tmp_path)
    mask = hard_mask(torch.zeros(space.n, dtype=torch.float64), space, budget)
    counts = {family.name: list(family.counts) for family in space.families}
    for name, widths in space.widths(mask).items():
        assert [width == count for width, count in zip(widths, counts[name], strict=True)] == [True, True, False, True]


def test_layers_kept_whole_exceed_the_budget() -> None:
    refuse(
        "keep_first",
        "3 of 4 layers",
        "75.0%",
        "0.4",
        "60.0%",
        keep_first=0.4,
        keep_last=0.15,
        sparsity=0.4,
        scope="global",
    )


def test_multiple_is_too_coarse_for_the_model_or_the_budget() -> None:
    refuse("budget.ffn_multiple", "64", "24 channels", ffn_multiple=64)
    refuse("budget.ffn_multiple", "20 channels", "0.85", ffn_multiple=20, sparsity=0.85)


@pytest.mark.parametrize("policy", ["units", "widths"])
def test_in_a_budget_for_every_layer_all_layers_keep_grids_of_the_same_size(policy: str, tmp_path: Path) -> None:
    """Steps of a chain would keep 2 KV heads with 2 query heads in one layer and 4 with 1 in another."""
    recipe = recipe_with(policy=policy, scope="per-layer")
    scores = Scores(random_scores(MODEL.shape, seed=5), "magnitude", "abc", MODEL.shape.unit_counts)
    space, budget, units = problem(recipe, tmp_path, scores)
    mask = hard_mask(torch.rand(space.n, dtype=torch.float64), space, budget)
    for block in ("attention", "ffn"):
        kept = {
            MODEL.shape.grids[block][layer].kept(part[units[layer, block]])
            for layer, part in enumerate(space.per_layer(mask, block))
        }
        assert len(kept) == 1
    estimated = estimated_units(recipe, MODEL.shape)
    assert {key: int(units[key].max()) for key in units} == {key: int(estimated[key].max()) for key in units}


def test_in_a_budget_for_every_layer_each_pays_for_itself(tmp_path: Path) -> None:
    space, budget, _ = problem(recipe_with(scope="per-layer", ffn_multiple=8, min_keep=0.3), tmp_path)
    mask = hard_mask(torch.linspace(0, 1, space.n, dtype=torch.float64), space, budget)
    widths = [int(part.sum()) for name in ("attention", "ffn") for part in space.per_layer(mask, name)]
    assert widths == [2, 2, 2, 2, 8, 8, 8, 8]
    refuse("budget.ffn_multiple", "16 channels", scope="per-layer", ffn_multiple=16)
    refuse("(attention of layer 0)", scope="per-layer", sparsity=0.7, min_keep=0.3)


def test_a_multiple_of_channels_does_not_matter_where_none_are_pruned(tmp_path: Path) -> None:
    recipe = recipe_with(ffn_multiple=64, families=("attention",))
    _, budget, _ = problem(recipe, tmp_path)
    assert budget.multiples == (1, 1, 1, 1)
