"""Weight magnitude: a metric that reads no data."""

from torch import Tensor

from pgprune_cli.scores.statistics import BlockStatistics


def magnitude(block: BlockStatistics) -> Tensor:
    """Return Σ W² over all weights of the element, in every projection of its block: `(elements,)` float64."""
    *inner, output = block.weights
    scores = block.per_element(block.weights[output].double().square().sum(0))
    for name in inner:
        scores = scores + block.per_element_of_rows(name, block.weights[name].double().square().sum(1))
    return scores
