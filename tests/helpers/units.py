"""Units of a model's blocks, as a unit search and a width search have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pgprune_cli.core.space import WHOLE_FAMILIES, MaskSpace
from pgprune_cli.model.prunable import BlockCosts, Partitions, Shape
from pgprune_cli.recipe.schema import MetricName
from pgprune_cli.scores.metrics import partitions, score_name, unit_ranks

FAMILIES = ("attention", "ffn")


def random_scores(shape: Shape, seed: int = 0) -> dict[str, Tensor]:
    """Return a random score of every element, float64, by its name in a score file."""
    generator = torch.Generator().manual_seed(seed)
    return {
        score_name(layer, block): torch.rand(grid.elements, generator=generator, dtype=torch.float64)
        for block, grids in shape.grids.items()
        for layer, grid in enumerate(grids)
    }


def group_units(
    shape: Shape, families: Sequence[str] = FAMILIES, costs: BlockCosts | None = None
) -> tuple[MaskSpace, Partitions]:
    """Return the units of a unit search: KV heads, channels or experts, or whole blocks."""
    units = partitions(shape, families, True, costs or shape.parameters, {}, "magnitude")
    return shape.space(families, units, costs), units


def chain_units(
    shape: Shape,
    families: Sequence[str] = FAMILIES,
    scores: Mapping[str, Tensor] | None = None,
    metric: MetricName = "magnitude",
) -> tuple[MaskSpace, Partitions]:
    """Return the units of a width search: the steps of the chains that scores say, random ones by default."""
    units = partitions(shape, families, False, shape.parameters, scores or random_scores(shape), metric)
    return shape.space(families, units), units


def ranks_of(
    shape: Shape,
    units: Partitions,
    scores: Mapping[str, Tensor] | None = None,
    metric: MetricName = "magnitude",
) -> dict[tuple[int, str], Tensor]:
    """Return a number for every unit of a width search: units are removed by rising number."""
    scores = scores or random_scores(shape)
    return {
        (layer, block): unit_ranks(scores[score_name(layer, block)], partition, shape.grids[block][layer], metric)
        for (layer, block), partition in units.items()
        if block not in WHOLE_FAMILIES
    }
