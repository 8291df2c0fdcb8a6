"""Weight magnitude, the metric that looks at no data."""

from torch import Tensor

from pgprune_cli.scores.statistics import BlockStatistics


def magnitude(block: BlockStatistics) -> Tensor:
    """Σ W² over all weights of the unit, in every projection of its block: `(units,)` float64."""
    *inner, output = block.weights.values()
    scores = block.per_unit(output.double().square().sum(0))
    for weight in inner:  # rows of these belong to the unit
        scores = scores + block.per_unit(weight.double().square().sum(1))
    return scores
