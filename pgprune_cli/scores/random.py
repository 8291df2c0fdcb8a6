"""The control: a random order."""

import torch
from torch import Tensor

from pgprune_cli.scores.statistics import BlockStatistics


def random(block: BlockStatistics) -> Tensor:
    """Return independent uniform draws, the same for the same seed: `(elements,)` float64."""
    generator = torch.Generator().manual_seed(block.seed)
    return torch.rand(block.grid.elements, generator=generator, dtype=torch.float64)
