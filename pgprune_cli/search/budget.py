"""From a recipe's budget to units with their costs and what of them may be kept."""

from __future__ import annotations

from pathlib import Path

import torch

from pgprune_cli.console.progress import SILENT, Progress
from pgprune_cli.core.space import Budget, MaskSpace, budget_of
from pgprune_cli.errors import UserError
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.model.prunable import UnitCosts
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.run.layout import COSTS_FILE
from pgprune_cli.search.costs import flops, kv_cache, latency_of_run


def budget_for(
    recipe: Recipe, evaluator: Evaluator, run: Path, fingerprint: str, progress: Progress = SILENT
) -> tuple[MaskSpace, Budget]:
    """The recipe's units, with their costs in what it budgets, and its budget.

    A latency is measured once and kept in `run`, with the `fingerprint` of the model. Raises UserError for limits that
    do not fit the budget and for a damaged `costs.json`.
    """
    wanted = recipe.budget
    space = evaluator.shape.space(recipe.units.families, _costs(recipe, evaluator, run, fingerprint, progress))
    multiples = {"ffn": wanted.ffn_multiple}
    budget = budget_of(space, wanted.sparsity, wanted.scope, wanted.min_keep, multiples)
    _refuse_what_cannot_be(recipe, space, budget)
    return space, budget


def _costs(recipe: Recipe, evaluator: Evaluator, run: Path, fingerprint: str, progress: Progress) -> UnitCosts:
    wanted = recipe.budget
    match wanted.measure:
        case "flops":
            return flops(evaluator.model, wanted.context)
        case "kv-cache":
            return kv_cache(evaluator.model, wanted.context)
        case "latency":
            with progress.working(f"measuring what units cost in time ({COSTS_FILE})"):
                return latency_of_run(run, evaluator, wanted.context, fingerprint)
    return evaluator.shape.parameters


def _refuse_what_cannot_be(recipe: Recipe, space: MaskSpace, budget: Budget) -> None:
    """What depends on the model's sizes; `recipe.load` has refused what no model could satisfy."""
    wanted = recipe.budget
    multiple = f" and multiples of {wanted.ffn_multiple}" if wanted.ffn_multiple > 1 else ""
    for constraint, needed in zip(budget, budget.needed(space), strict=True):
        if needed > constraint.kept:
            raise UserError(
                f"budget.min_keep: {wanted.min_keep} of every layer, in whole units{multiple}, comes to "
                f"{needed / constraint.total:.1%} of the {wanted.measure} ({constraint.name}), and budget.sparsity "
                f"{wanted.sparsity} leaves {constraint.kept / constraint.total:.1%}; lower one of them"
            )
    for family in space.families:
        if family.name != "ffn" or wanted.ffn_multiple == 1:
            continue
        if wanted.ffn_multiple > max(family.counts):
            raise UserError(
                f"budget.ffn_multiple: {wanted.ffn_multiple} is more than the {max(family.counts)} channels "
                "of a layer; lower it"
            )
        if not any(
            min(wanted.ffn_multiple, count) * cost <= kept
            for count, cost, kept in zip(family.counts, family.costs, _kept(space, budget, "ffn"), strict=True)
        ):
            raise UserError(
                f"budget.ffn_multiple: not even {wanted.ffn_multiple} channels of one layer fit into what "
                f"budget.sparsity {wanted.sparsity} leaves; lower one of them"
            )


def _kept(space: MaskSpace, budget: Budget, name: str) -> list[int]:
    """What the constraint over each layer of a family keeps."""
    starts = [part[0] if len(part) else -1 for part in space.per_layer(torch.arange(space.n), name)]
    return [next((c.kept for c in budget if c.start <= start < c.stop), 0) for start in starts]
