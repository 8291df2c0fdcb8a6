"""The table of metrics, and `score`, which applies one of them to a model.

To add a metric, write `scores/<name>.py` with a function from `BlockStatistics` to `(elements,)` float64, where higher
means more important. Elements are query heads or FFN channels. Add it to METRICS, add to NEEDS what it reads from
calibration text, and add its name to `MetricName` in `recipe/schema.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from pgprune_cli.console.progress import NO_PROGRESS, LayerProgress
from pgprune_cli.core.grid import (
    Grid,
    GridCost,
    Partition,
    chain_of_removal,
    chain_of_scores,
    is_chain,
    one_unit_per_group,
    unit_count,
)
from pgprune_cli.core.space import BLOCKS_OF, WHOLE_FAMILIES, MaskSpace
from pgprune_cli.distributed import ALONE, Ranks
from pgprune_cli.model.prunable import BlockCosts, Partitions, PrunableModel, Shape
from pgprune_cli.scores.flap import flap, flap_adaptive
from pgprune_cli.scores.magnitude import magnitude
from pgprune_cli.scores.obs import obs
from pgprune_cli.scores.random import random
from pgprune_cli.scores.statistics import BlockStatistics, Statistic, statistics
from pgprune_cli.scores.taylor import taylor
from pgprune_cli.scores.uniform import uniform
from pgprune_cli.scores.wanda_sp import wanda_sp

Metric = Callable[[BlockStatistics], Tensor]

METRICS: dict[str, Metric] = {
    "wanda-sp": wanda_sp,
    "flap": flap,
    "flap-adaptive": flap_adaptive,
    "obs": obs,
    "taylor": taylor,
    "magnitude": magnitude,
    "random": random,
    "uniform": uniform,
}
NEEDS: dict[str, Statistic] = {
    "wanda-sp": "input_norms",
    "flap": "fluctuations",
    "flap-adaptive": "fluctuations",
    "obs": "covariance",
    "taylor": "gradients",
}
"""The statistic over calibration text that a metric needs. Metrics that are not listed read no text."""
CUMULATIVE = ("obs",)
"""The metrics whose scores are the error by the time an element is removed, so that they do not add up."""
CALIBRATED = frozenset(NEEDS)
"""The metrics that read calibration text."""


def score(
    model: PrunableModel,
    metric: str,
    batches: Sequence[Tensor],
    seed: int,
    only: Collection[int] | None = None,
    progress: LayerProgress = NO_PROGRESS,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """Return the score of every element: `layers.<l>.attention` `(query heads,)`, `layers.<l>.ffn` `(channels,)`.

    All float64.

    batches: tokens `(B, T)`, read only for a calibrated metric; only: if given, score just these layers; ranks: of the
    processes that score the others. Raises ValueError if a calibrated metric gets no text.
    """
    layers = range(model.shape.layers) if only is None else only
    scores = {
        score_name(layer, block): torch.zeros(0, dtype=torch.float64)  # for blocks that a layer lacks
        for layer in layers
        for block in model.shape.grids
    }
    for name, layer, block in statistics(model, NEEDS.get(metric), batches, seed, only, progress, ranks):
        scores[score_name(layer, name)] = METRICS[metric](block).cpu()
        del block  # frees its covariance before the next one is collected
        if name == model.family.blocks_of(model.layers[layer])[-1].name:
            progress.layer_done()
    return scores


def score_name(layer: int, block: str) -> str:
    """Return the name under which the scores of a block are stored."""
    return f"layers.{layer}.{block}"


def partitions(
    shape: Shape,
    families: Sequence[str],
    by_group: bool,
    costs: BlockCosts,
    scores: Mapping[str, Tensor],
    metric: str,
    ffn_multiple: int = 1,
) -> Partitions:
    """Return the units of every block that the families name: by (layer, block), the unit of each element.

    The elements of a line are units. In a grid, the units are whole groups (KV heads, experts) if `by_group`, or if
    single elements cost nothing in the measure of `costs`. Otherwise they are the steps of the chain that the scores
    say, from the last to the first. Experts keep a multiple of `ffn_multiple` channels.
    """
    result: dict[tuple[int, str], Partition] = {}
    for block in families:
        if block in WHOLE_FAMILIES:
            continue
        for layer, (grid, cost) in enumerate(zip(shape.grids[block], costs[block], strict=True)):
            own = scores.get(score_name(layer, block), torch.zeros(0))  # not read for elements and whole groups
            result[layer, block] = partition_of(grid, cost, by_group, own, metric, ffn_multiple)
    return result


def partition_of(
    grid: Grid, cost: GridCost, by_group: bool, scores: Tensor, metric: str, ffn_multiple: int
) -> Partition:
    """Return the units of one block, as `partitions` does. scores: `(elements,)`."""
    if grid.is_line or by_group or not (cost.element or cost.member):
        return one_unit_per_group(grid)
    if metric in CUMULATIVE and not grid.separate:
        return chain_of_removal(scores)
    return chain_of_scores(scores, grid, cost, ffn_multiple, cumulative=metric in CUMULATIVE)


def unit_scores(scores: Tensor, partition: Partition, metric: str) -> Tensor:
    """Return the score of every unit of a block, `(units,)` float64, from those of its elements `(elements,)`.

    The units are elements or whole groups. A cumulative score of a group is that of its last element.
    """
    if len(scores) == unit_count(partition):
        return scores.double()
    by_unit = scores.double().view(unit_count(partition), -1)  # whole groups
    return by_unit.amax(1) if metric in CUMULATIVE else by_unit.sum(1)


def unit_ranks(scores: Tensor, partition: Partition, grid: Grid, metric: str) -> Tensor:
    """Return a number for every unit of a block, `(units,)` float64: units are removed by rising number.

    Those of a chain are removed from the last to the first.
    """
    if is_chain(partition, grid):
        return -torch.arange(unit_count(partition), dtype=torch.float64)
    return unit_scores(scores, partition, metric)


def block_score(scores: Tensor, grid: Grid, metric: str) -> Tensor:
    """Return the score of a whole block, float64, from those of its elements `(elements,)`.

    Cumulative scores do not add up: the last element's is that of the block, or of its group if groups are separate.
    """
    if metric not in CUMULATIVE or not len(scores):
        return scores.double().sum()
    return scores.double().view(grid.groups if grid.separate else 1, -1).amax(1).sum()


def flat_scores(
    scores: Mapping[str, Tensor],
    space: MaskSpace,
    partitions: Partitions,
    grids: Mapping[str, Sequence[Grid]],
    metric: str,
) -> Tensor:
    """Return scores along the space's flat axis, `(n,)` float64. A whole layer gets the sum of its blocks' scores.

    grids: by block, one for each layer.
    """
    parts = []
    for family in space.families:
        for layer in range(len(family.counts)):
            blocks = {block: scores[score_name(layer, block)] for block in BLOCKS_OF[family.name]}
            if family.name in WHOLE_FAMILIES:
                whole = [block_score(values, grids[block][layer], metric) for block, values in blocks.items()]
                parts.append(torch.stack(whole).sum(0, keepdim=True)[: family.counts[layer]])
            else:
                parts += [unit_scores(values, partitions[layer, block], metric) for block, values in blocks.items()]
    return torch.cat(parts)
