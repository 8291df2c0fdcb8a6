"""From a recipe's budget to units with their costs and to what of them may be kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pgprune_cli.core.grid import Grid, GridCost, Partition, unit_multiple
from pgprune_cli.core.space import WHOLE_FAMILIES, Budget, Family, MaskSpace, budget_of
from pgprune_cli.errors import UserError
from pgprune_cli.model.prunable import BlockCosts, Partitions, PrunableModel, Shape
from pgprune_cli.recipe.schema import BudgetSettings, Recipe
from pgprune_cli.run.layout import COSTS_FILE
from pgprune_cli.run.scores import Scores
from pgprune_cli.scores.metrics import partition_of, partitions
from pgprune_cli.search.context import SearchContext
from pgprune_cli.search.costs import active_parameters, flops, kv_cache, latency_of_run


def budget_for(context: SearchContext, scores: Scores) -> tuple[MaskSpace, Budget, Partitions]:
    """Return the recipe's units with their costs in its measure, its budget, and the elements of the units.

    A latency is measured once and kept in the run directory. Raises UserError for limits that do not fit the budget.
    """
    recipe, model = context.recipe, context.model
    if recipe.budget.measure == "latency":
        with context.progress.working(f"measuring the latency of units ({COSTS_FILE})"):
            costs = latency_of_run(context.run, model, recipe.budget.context, context.fingerprint)
    else:
        costs = counted_costs(recipe, model)
    _refuse_single_experts(recipe, costs)
    partitions = units_of(recipe, model.shape, costs, scores.tensors, scores.metric)
    space, budget = _limits(recipe, model.shape, costs, partitions)
    return space, budget, partitions


def check_budget(recipe: Recipe, model: PrunableModel) -> None:
    """Raise UserError for a budget that a model of these sizes cannot meet. Its weights may be on the meta device.

    Before there are scores, the units of a grid (query heads, channels of experts) are estimated. A latency is not
    checked: it can only be measured.
    """
    if recipe.budget.measure == "latency":
        return
    costs = counted_costs(recipe, model)
    _refuse_single_experts(recipe, costs)
    _limits(recipe, model.shape, costs, estimated_units(recipe, model.shape, costs))


def _limits(recipe: Recipe, shape: Shape, costs: BlockCosts, partitions: Partitions) -> tuple[MaskSpace, Budget]:
    """Return the units with their costs, and the budget. Raises UserError for limits that do not fit the budget."""
    settings = recipe.budget
    space = shape.space(recipe.units.families, partitions, costs)
    multiples = {"ffn": tuple(unit_multiple(grid, settings.ffn_multiple) for grid in shape.grids["ffn"])}
    whole_layers = layers_kept_whole(settings, shape.layers)
    budget = budget_of(space, settings.sparsity, settings.scope, settings.min_keep, multiples, whole_layers)
    _refuse_impossible(recipe, shape, space, budget)
    return space, budget


def layers_kept_whole(settings: BudgetSettings, layers: int) -> list[int]:
    """Return the layers in which nothing is removed: the first and the last ones that the settings name."""
    first, last = round(settings.keep_first * layers), round(settings.keep_last * layers)
    return [layer for layer in range(layers) if layer < first or layer >= layers - last]


def units_of(recipe: Recipe, shape: Shape, costs: BlockCosts, scores: Mapping[str, Tensor], metric: str) -> Partitions:
    """Return the units of a recipe's search."""
    by_group = _by_group(recipe, costs)
    return partitions(shape, recipe.units.families, by_group, costs, scores, metric, recipe.budget.ffn_multiple)


def _by_group(recipe: Recipe, costs: BlockCosts) -> bool:
    """Return whether the units of a grid are whole groups (KV heads, experts) rather than steps of its chain.

    Those of a unit search are. With `budget.scope: per-layer` they are too, because chains of the same cost would keep
    2 KV heads with 2 query heads in one layer and 1 with 4 in another. The result would not be a stock model.
    """
    counts_members = any(cost.member for by_layer in costs.values() for cost in by_layer)
    return recipe.search.policy == "units" or (recipe.budget.scope == "per-layer" and not counts_members)


def estimated_units(recipe: Recipe, shape: Shape, costs: BlockCosts | None = None) -> Partitions:
    """Return units of the same number and total cost as a search will have. For estimates, before there are scores.

    costs: in the measure of the budget, parameters by default.
    """
    costs = costs or shape.parameters
    made: dict[tuple[Grid, GridCost], Partition] = {}
    by_group = _by_group(recipe, costs)
    units: dict[tuple[int, str], Partition] = {}
    for block in recipe.units.families:
        if block in WHOLE_FAMILIES:
            continue
        for layer, key in enumerate(zip(shape.grids[block], costs[block], strict=True)):
            if key not in made:  # layers that are alike have the same units
                evenly = torch.arange(key[0].elements) + 1.0
                made[key] = partition_of(*key, by_group, evenly, "magnitude", recipe.budget.ffn_multiple)
            units[layer, block] = made[key]
    return units


def counted_costs(recipe: Recipe, model: PrunableModel) -> BlockCosts:
    """Return the costs in a measure that needs no measuring. The weights may be on the meta device."""
    settings = recipe.budget
    match settings.measure:
        case "flops":
            return flops(model, settings.context)
        case "active-parameters":
            return active_parameters(model)
        case "kv-cache":
            return kv_cache(model, settings.context)
    return model.shape.parameters


def _refuse_single_experts(recipe: Recipe, costs: BlockCosts) -> None:
    """Raise UserError for a unit search in a measure of the channels of experts."""
    if recipe.search.policy == "units" and any(cost.member for by_layer in costs.values() for cost in by_layer):
        raise UserError(
            f"budget.measure: the {recipe.budget.measure} of this model depend on the channels of its experts, but a "
            "unit search removes only whole experts. Set search.policy to widths, or budget.measure to parameters."
        )


def _refuse_impossible(recipe: Recipe, shape: Shape, space: MaskSpace, budget: Budget) -> None:
    """Raise UserError for a budget that this model's sizes cannot meet; the reader has refused what no model could."""
    settings = recipe.budget
    multiple = f" and multiples of {settings.ffn_multiple}" if settings.ffn_multiple > 1 else ""
    for constraint, needed in zip(budget, budget.needed(space), strict=True):
        if needed > constraint.kept and (whole := layers_kept_whole(settings, shape.layers)):
            raise UserError(
                f"budget.keep_first, keep_last: keeping {len(whole)} of {shape.layers} layers whole takes "
                f"{needed / constraint.total:.1%} of the {settings.measure} ({constraint.name}), but budget.sparsity "
                f"{settings.sparsity} leaves {constraint.kept / constraint.total:.1%}. Lower one of them."
            )
        if needed > constraint.kept:
            raise UserError(
                f"budget.min_keep: {settings.min_keep} of every layer, rounded up to whole units{multiple}, takes "
                f"{needed / constraint.total:.1%} of the {settings.measure} ({constraint.name}), but budget.sparsity "
                f"{settings.sparsity} leaves {constraint.kept / constraint.total:.1%}. Lower one of them."
            )
    for family in space.families:
        if family.name == "ffn" and settings.ffn_multiple > 1:
            _refuse_multiple(settings, shape.grids["ffn"], family, _kept_by_layer(space, budget, "ffn"))


def _refuse_multiple(settings: BudgetSettings, grids: Sequence[Grid], family: Family, kept: Sequence[int]) -> None:
    """Raise UserError if no layer can keep as many channels as `budget.ffn_multiple` says.

    kept: the cost that the constraint over each layer keeps.
    """
    multiple, channels = settings.ffn_multiple, max(grid.members for grid in grids)
    if multiple > channels:
        raise UserError(f"budget.ffn_multiple: {multiple} is more than the {channels} channels of a layer. Lower it.")
    lines = [layer for layer, grid in enumerate(grids) if grid.is_line]  # experts lose channels in larger steps
    if lines and not any(int(family.layer_costs(layer)[:multiple].sum()) <= kept[layer] for layer in lines):
        raise UserError(
            f"budget.ffn_multiple: budget.sparsity {settings.sparsity} leaves no room for even {multiple} channels of "
            "one layer. Lower one of them."
        )


def _kept_by_layer(space: MaskSpace, budget: Budget, name: str) -> list[int]:
    """Return the cost that the constraint over each layer of a family keeps."""
    starts = [part[0] if len(part) else -1 for part in space.per_layer(torch.arange(space.n), name)]
    return [next((c.kept for c in budget if c.start <= start < c.stop), 0) for start in starts]
