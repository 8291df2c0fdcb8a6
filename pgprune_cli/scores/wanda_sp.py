"""Wanda for structures (Sun et al. 2023; as wanda-sp in An et al. 2024)."""

from torch import Tensor

from pgprune_cli.scores.statistics import BlockStatistics


def wanda_sp(block: BlockStatistics) -> Tensor:
    """Return Σ |W_ij| · ‖X_j‖₂ over rows i and the element's columns j of the output: `(elements,)` float64."""
    if block.input_norms is None:
        raise ValueError("wanda-sp needs calibration text")
    return block.per_element(block.output_weight.abs().sum(0, dtype=block.input_norms.dtype) * block.input_norms)
