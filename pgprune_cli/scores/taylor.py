"""First-order Taylor expansion of the loss (LLM-Pruner; Ma et al. 2023, arXiv 2305.11627). Needs a backward pass."""

from torch import Tensor

from pgprune_cli.scores.statistics import BlockStatistics


def taylor(block: BlockStatistics) -> Tensor:
    """Σ |W · ∂L/∂W| over all weights of the unit, in every projection of its block: `(units,)` float64, nats per token.

    LLM-Pruner's `param_first` with group reduction `sum`: the gradient is that of the loss over all calibration text,
    the absolute value is taken of each weight on its own, and biases do not count. Raises ValueError without gradients.
    """
    if block.gradients is None:
        raise ValueError("taylor needs calibration text")
    *inner, output = (
        (weight.double() * block.gradients[name].double()).abs() for name, weight in block.weights.items()
    )
    scores = block.per_unit(output.sum(0))
    for change in inner:  # rows of these belong to the unit
        scores = scores + block.per_unit(change.sum(1))
    return scores
