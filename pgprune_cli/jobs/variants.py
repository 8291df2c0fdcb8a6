"""The variants that `pgprune compare` runs: the recipe with a few keys changed.

First come other published methods, then an ablation of the recipe itself: metric, start, widths and repair, each with
and without, and another objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pgprune_cli.console.suggest import nearest
from pgprune_cli.errors import UserError
from pgprune_cli.recipe.schema import MetricName, Objective, Recipe, RepairMethod

Searched = Literal["nothing", "repaired error", "units", "widths"]


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    name: also the name of its directory; shows: what the row is there for; seeded: whether another seed gives another
    result, which takes a search or random scores.
    """

    name: str
    shows: str
    recipe: Recipe
    seeded: bool

    def seeds(self, seeds: Sequence[int]) -> Sequence[int]:
        """Return the seeds to run it with: only the first one if the seed makes no difference."""
        return seeds if self.seeded else seeds[:1]


METHODS: tuple[tuple[str, str, MetricName, RepairMethod], ...] = (
    ("random", "random scores", "random", "none"),
    ("magnitude", "sum of squared weights", "magnitude", "none"),
    ("wanda-sp", "Wanda-sp", "wanda-sp", "none"),
    ("flap", "FLAP with its bias", "flap", "bias"),
    ("llm-pruner", "LLM-Pruner's Taylor scores, with a backward pass", "taylor", "none"),
    ("sparsegpt", "SparseGPT on units, with its weight updates", "obs", "least-squares"),
)
"""Name, what it is, metric and repair of the published methods that remove the units with the lowest scores."""
LLM_PRUNER_LAYERS = (4 / 32, 2 / 32)
LLM_PRUNER_LAYERS_AT_HALF = (3 / 32, 1 / 32)
"""The fractions of the first and last layers that LLM-Pruner keeps whole, and those from 50 % on (its README)."""
LLM_PRUNER_TEXT = (10, 64)
"""Examples, and tokens of each, whose gradient LLM-Pruner takes."""


def variants_of(recipe: Recipe) -> list[Variant]:
    """Return all variants of a recipe. A method that equals a row of the ablation has no row of its own."""
    ablation = _ablation(recipe)
    ablated = [variant.recipe for variant in ablation]
    return [*(variant for variant in _methods(recipe) if variant.recipe not in ablated), *ablation]


def select_variants(recipe: Recipe, only: Sequence[str]) -> list[Variant]:
    """Return the variants named in `only`, or all if it is empty. Raises UserError for an unknown name."""
    variants = variants_of(recipe)
    names = [variant.name for variant in variants]
    if unknown := sorted(set(only) - set(names)):
        hint = nearest(unknown[0], names, most=3) or "."
        raise UserError(f"--only {unknown[0]}: no such variant{hint} Expected one of {', '.join(names)}.")
    return [variant for variant in variants if not only or variant.name in only]


def _methods(recipe: Recipe) -> list[Variant]:
    """Return two rows for every published method: one width for all layers, and widths that follow from the scores."""
    variants = []
    for name, shows, metric, repair in METHODS:
        seeded = metric == "random"
        uniform = _changed(recipe, "nothing", repair, metric, uniform=True)
        own_widths, widths = _changed(recipe, "nothing", repair, metric), "widths chosen by the scores"
        if name == "flap":
            own_widths, widths = _flap_adaptive(own_widths), "widths chosen by standardised scores"
        elif name == "llm-pruner":
            uniform, own_widths = _llm_pruner_text(uniform), _llm_pruner_layers(_llm_pruner_text(own_widths))
            widths = "the same width in all layers but the first and last ones, which stay whole"
        variants += [
            Variant(f"{name}-uniform", f"{shows}, the same width in every layer", uniform, seeded),
            Variant(name, f"{shows}, {widths}", own_widths, seeded),
        ]
    return variants


def _flap_adaptive(recipe: Recipe) -> Recipe:
    """Return the recipe with one threshold for the standardised scores of all layers and blocks (FLAP's AL-AM)."""
    scores, start = replace(recipe.scores, metric="flap-adaptive"), replace(recipe.start, mapping="global-rank")
    return replace(recipe, scores=scores, start=start, budget=replace(recipe.budget, scope="global"))


def _llm_pruner_text(recipe: Recipe) -> Recipe:
    """Return the recipe with scores from as little text as LLM-Pruner reads: the gradient of more text is smaller."""
    windows, seqlen = LLM_PRUNER_TEXT
    return replace(recipe, scores=replace(recipe.scores, windows=windows, seqlen=seqlen))


def _llm_pruner_layers(recipe: Recipe) -> Recipe:
    """Return the recipe that removes the same fraction from every layer except the first and the last ones."""
    first, last = LLM_PRUNER_LAYERS_AT_HALF if recipe.budget.sparsity >= 0.5 else LLM_PRUNER_LAYERS
    budget = replace(recipe.budget, scope="global", keep_first=first, keep_last=last)
    return replace(recipe, budget=budget, start=replace(recipe.start, mapping="rank"))


def _ablation(recipe: Recipe) -> list[Variant]:
    """Return the rows from the recipe's metric alone to the whole recipe."""
    metric, repair = recipe.scores.metric, recipe.repair.method

    def scored(name: str, shows: str, repair: RepairMethod, uniform: bool = False) -> Variant:
        return Variant(name, shows, _changed(recipe, "nothing", repair, uniform=uniform), seeded=False)

    def searched(name: str, shows: str, over: Searched, repair: RepairMethod, start: MetricName = metric) -> Variant:
        return Variant(name, shows, _changed(recipe, over, repair, start), seeded=True)

    least_squares = searched("widths-least-squares", "width search, repaired in closed form", "widths", "least-squares")
    by_error = _changed(recipe, "repaired error", repair)
    return [
        scored("metric-uniform", f"{metric} only, the same width in every layer", "none", uniform=True),
        scored("metric", f"{metric} only, widths chosen by the scores", "none"),
        scored("metric-uniform-repaired", "metric-uniform, repaired", repair, uniform=True),
        scored("metric-repaired", "metric, repaired", repair),
        Variant("error-widths-repaired", "widths chosen by the repaired error alone", by_error, seeded=False),
        searched("random-start", "the paper's search from a random start", "units", "none", "random"),
        searched("uniform-start", "the paper's search from a uniform start", "units", "none", "uniform"),
        searched("metric-start", "the paper's search from the metric", "units", "none"),
        searched("metric-start-repaired", "metric-start, repaired", "units", repair),
        searched("widths", "width search, without repair", "widths", "none"),
        *([least_squares] if repair != "least-squares" else []),
        searched("widths-repaired", "width search, with repair", "widths", repair),
        _with_other_objective(_changed(recipe, "widths", repair)),
    ]


def _with_other_objective(recipe: Recipe) -> Variant:
    """Return the row that minimises KL to the dense model instead of the loss, or the loss if the recipe does."""
    objective: Objective = "loss" if recipe.search.objective == "kl" else "kl"
    shows = {"kl": "widths-repaired, minimising KL to the dense model", "loss": "widths-repaired, minimising the loss"}
    changed = replace(recipe, search=replace(recipe.search, objective=objective))
    return Variant(f"widths-{objective}", shows[objective], changed, seeded=True)


def _changed(
    recipe: Recipe, searched: Searched, repair: RepairMethod, metric: MetricName | None = None, *, uniform: bool = False
) -> Recipe:
    """Return the recipe with another search, repair and metric; None keeps the metric.

    searched: "nothing" takes the units by their scores, "repaired error" takes the widths by the repair's error;
    neither needs a forward pass of the search. uniform: all layers get the same width.
    """
    units = replace(recipe.search, policy="units", objective="loss", masks_per_step=2, estimator="paper")
    widths = replace(recipe.search, policy="widths")
    searches = {
        "nothing": replace(units, forward_passes=0),
        "repaired error": replace(widths, forward_passes=0),
        "units": units,
        "widths": widths,
    }
    return replace(
        recipe,
        search=searches[searched],
        repair=replace(recipe.repair, method=repair),
        scores=replace(recipe.scores, metric=metric or recipe.scores.metric),
        budget=replace(recipe.budget, scope="per-layer") if uniform else recipe.budget,
    )
