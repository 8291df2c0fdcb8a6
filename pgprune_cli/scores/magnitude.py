"""Weight magnitude: a metric that reads no data."""

from torch import Tensor

from pgprune_cli.scores.statistics import BlockStatistics


def magnitude(block: BlockStatistics) -> Tensor:
    """Return Σ W² over all weights of the unit, in every projection of its block: `(units,)` float64."""
    *inner, output = block.weights.values()
    scores = block.per_unit(output.double().square().sum(0))
    for weight in inner:  # a unit is a run of their rows
        scores = scores + block.per_unit(weight.double().square().sum(1))
    return scores
