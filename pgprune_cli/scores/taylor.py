"""First-order Taylor expansion of the loss (LLM-Pruner; Ma et al. 2023, arXiv 2305.11627). Needs a backward pass."""

from torch import Tensor

from pgprune_cli.scores.statistics import BlockStatistics


def taylor(block: BlockStatistics) -> Tensor:
    """Return Σ |W · ∂L/∂W| over all weights of the element, in every projection: `(elements,)` float64, nats per token.

    LLM-Pruner's `param_first` with group reduction `sum`: the gradient is that of the loss over all calibration text,
    absolute values are taken per weight, and biases do not count. Raises ValueError without gradients.
    """
    if block.gradients is None:
        raise ValueError("taylor needs calibration text")
    changes = {name: (weight.double() * block.gradients[name].double()).abs() for name, weight in block.weights.items()}
    *inner, output = changes
    scores = block.per_element(changes[output].sum(0))
    for name in inner:
        scores = scores + block.per_element_of_rows(name, changes[name].sum(1))
    return scores
