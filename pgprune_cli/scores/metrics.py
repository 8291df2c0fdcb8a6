"""The table of metrics, and `score`, which applies one of them to a model.

To add a metric, write `scores/<name>.py` with a function from `BlockStatistics` to `(units,)` float64, where higher
means more important. Add it to METRICS, add to NEEDS what it reads from calibration text, and add its name to
`MetricName` in `recipe/schema.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from pgprune_cli.console.progress import NO_PROGRESS, LayerProgress
from pgprune_cli.core.space import BLOCKS_OF, WHOLE_FAMILIES, MaskSpace
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.scores.flap import flap
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
    "obs": obs,
    "taylor": taylor,
    "magnitude": magnitude,
    "random": random,
    "uniform": uniform,
}
NEEDS: dict[str, Statistic] = {
    "wanda-sp": "input_norms",
    "flap": "fluctuations",
    "obs": "covariance",
    "taylor": "gradients",
}
"""The statistic over calibration text that a metric needs. Metrics that are not listed read no text."""
CALIBRATED = frozenset(NEEDS)
"""The metrics that read calibration text."""


def score(
    model: PrunableModel,
    metric: str,
    batches: Sequence[Tensor],
    seed: int,
    only: Collection[int] | None = None,
    progress: LayerProgress = NO_PROGRESS,
) -> dict[str, Tensor]:
    """Return every unit's score: `layers.<l>.attention` `(KV heads,)` and `layers.<l>.ffn` `(channels,)`, float64.

    batches: tokens `(B, T)`, read only for a calibrated metric; only: if given, score just these layers. Raises
    ValueError if a calibrated metric gets no text.
    """
    scores = {}
    last = model.family.blocks[-1].name
    for name, layer, block in statistics(model, NEEDS.get(metric), batches, seed, only, progress):
        scores[score_name(layer, name)] = METRICS[metric](block).cpu()
        del block  # frees its covariance before the next one is collected
        if name == last:
            progress.layer_done()
    return scores


def score_name(layer: int, block: str) -> str:
    """Return the name under which the scores of a block are stored."""
    return f"layers.{layer}.{block}"


def flat_scores(scores: dict[str, Tensor], space: MaskSpace) -> Tensor:
    """Return scores along the space's flat axis: `(n,)` float64. A whole block or layer scores the sum of its units."""
    parts = []
    for family in space.families:
        for layer in range(len(family.counts)):
            blocks = [scores[score_name(layer, block)] for block in BLOCKS_OF[family.name]]
            if family.name in WHOLE_FAMILIES:
                parts.append(torch.stack([block.sum() for block in blocks]).sum(0, keepdim=True))
            else:
                parts.extend(blocks)
    return torch.cat(parts)
