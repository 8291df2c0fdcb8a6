"""Metrics that say how much a unit matters, each one small pure function in a file of its own.

To add one: write `scores/<name>.py` with a function from `BlockStatistics` to `(units,)` float64, higher = matters
more; put it into METRICS, and into NEEDS where it looks at calibration text; and its name into `MetricName` of
`recipe.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from pgprune_cli.core.space import MaskSpace
from pgprune_cli.model.prunable import Shape
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
"""What has to be collected over calibration text for a metric; those that are not here look at no text."""
CALIBRATED = frozenset(NEEDS)


def score(
    model: nn.Module,
    metric: str,
    batches: Sequence[Tensor],
    seed: int,
    only: Collection[int] | None = None,
    on_layers: Callable[[int], None] | None = None,
    on_batches: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Scores of every unit: `layers.<l>.attention` `(kv groups,)` and `layers.<l>.ffn` `(channels,)`, float64.

    `batches` of tokens `(B, T)` are read only for a calibrated metric; `only` of these layers, which no other has part
    in. `on_layers(1)` follows each, `on_batches(done, of)` those that go through all layers before the first is scored.
    Raises ValueError when it finds no text.
    """
    scores = {}
    last = Shape.of(model).spec.blocks()[-1][0]
    for name, layer, block in statistics(model, NEEDS.get(metric), batches, seed, only, on_batches):
        scores[f"layers.{layer}.{name}"] = METRICS[metric](block).cpu()
        del block  # its covariance goes before the next layer's comes
        if on_layers is not None and name == last:
            on_layers(1)
    return scores


def flat_scores(scores: dict[str, Tensor], shape: Shape, space: MaskSpace) -> Tensor:
    """The scores along the space's flat axis: `(n,)` float64. A whole block or layer scores the sum of its units."""
    parts = []
    for family in space.families:
        for layer in range(len(shape.channels)):
            attention, ffn = scores[f"layers.{layer}.attention"], scores[f"layers.{layer}.ffn"]
            parts.append(
                {
                    "attention": attention,
                    "ffn": ffn,
                    "attention-block": attention.sum(0, keepdim=True),
                    "ffn-block": ffn.sum(0, keepdim=True),
                    "layer": attention.sum(0, keepdim=True) + ffn.sum(0, keepdim=True),
                }[family.name]
            )
    return torch.cat(parts)
