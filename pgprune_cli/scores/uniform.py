"""The uninformed start: all elements are equal, so that θ starts at the keep fraction everywhere."""

import torch
from torch import Tensor

from pgprune_cli.scores.statistics import BlockStatistics


def uniform(block: BlockStatistics) -> Tensor:
    """Return ones: `(elements,)` float64."""
    return torch.ones(block.grid.elements, dtype=torch.float64)
