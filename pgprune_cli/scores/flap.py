"""Fluctuation: the part of an input that a bias cannot replace (FLAP's WIFV; An et al. 2024, arXiv 2312.11983)."""

from torch import Tensor

from pgprune_cli.scores.statistics import BlockStatistics


def flap(block: BlockStatistics) -> Tensor:
    """Return Σ var(X_j) · ‖W_:j‖₂² over the element's columns j of the output projection: `(elements,)` float64.

    The mean of a removed input can move into the projection's bias; its variance is lost. Raises ValueError without
    fluctuations.
    """
    if block.fluctuations is None:
        raise ValueError("flap needs calibration text")
    return block.per_element(block.output_weight.double().square().sum(0) * block.fluctuations)
