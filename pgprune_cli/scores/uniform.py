"""The uninformed start: all units are equal, so that θ starts at the keep fraction everywhere."""

import torch
from torch import Tensor

from pgprune_cli.scores.statistics import BlockStatistics


def uniform(block: BlockStatistics) -> Tensor:
    """Return ones: `(units,)` float64."""
    return torch.ones(block.units, dtype=torch.float64)
