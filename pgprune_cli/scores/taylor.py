"""First-order Taylor expansion of the loss (LLM-Pruner; Ma et al. 2023, arXiv 2305.11627). Needs a backward pass."""

from torch import Tensor

from pgprune_cli.scores.statistics import BlockStatistics


def taylor(block: BlockStatistics) -> Tensor:
    """Return Σ |W · ∂L/∂W| over all weights of the unit, in every projection: `(units,)` float64, nats per token.

    LLM-Pruner's `param_first` with group reduction `sum`: the gradient is that of the loss over all calibration text,
    absolute values are taken per weight, and biases do not count. Raises ValueError without gradients.
    """
    if block.gradients is None:
        raise ValueError("taylor needs calibration text")
    *inner, output = (
        (weight.double() * block.gradients[name].double()).abs() for name, weight in block.weights.items()
    )
    scores = block.per_unit(output.sum(0))
    for change in inner:  # a unit is a run of their rows
        scores = scores + block.per_unit(change.sum(1))
    return scores
