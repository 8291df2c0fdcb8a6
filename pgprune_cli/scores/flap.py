"""Fluctuation: the part of an input that a bias cannot replace (FLAP's WIFV; An et al. 2024, arXiv 2312.11983)."""

import torch
from torch import Tensor

from pgprune_cli.scores.statistics import BlockStatistics


def flap(block: BlockStatistics) -> Tensor:
    """Return Σ var(X_j) · ‖W_:j‖₂² over the element's columns j of the output projection: `(elements,)` float64.

    The mean of a removed input can move into the projection's bias; its variance is lost. Raises ValueError without
    fluctuations.
    """
    return block.per_element(_fluctuations(block, "flap"))


def flap_adaptive(block: BlockStatistics) -> Tensor:
    """Return scores that are comparable across layers and blocks (FLAP's AL-AM): `(elements,)` float64 in (0, 1).

    The scores of the block's columns become z-scores, those of heads (several columns each) after squaring, as in the
    authors' code. A channel or KV head gets the mean z-score of its columns. The logistic function of it makes scores
    that may be added; the query heads of a KV head share its score in proportion to their own. Raises ValueError
    without fluctuations.
    """
    columns, grid = _fluctuations(block, "flap-adaptive"), block.grid
    if len(columns) > grid.elements:
        columns = columns.square()
    spread = columns.std()
    standardised = (columns - columns.mean()) / spread if spread > 0 else torch.zeros_like(columns)
    groups = grid.elements if grid.is_line else grid.groups
    group_scores = standardised.unflatten(0, (groups, -1)).mean(1).sigmoid()
    parts = block.per_element(columns).unflatten(0, (groups, -1))
    totals = parts.sum(1, keepdim=True)
    shares = torch.where(totals > 0, parts / totals, 1.0 / parts.shape[1])
    scores: Tensor = (group_scores[:, None] * shares).flatten()
    return scores


def _fluctuations(block: BlockStatistics, metric: str) -> Tensor:
    """Return the score of every column of the output projection, `(in,)` float64."""
    if block.fluctuations is None:
        raise ValueError(f"{metric} needs calibration text")
    columns: Tensor = block.output_weight.double().square().sum(0) * block.fluctuations
    return columns
