"""Properties of grids of elements, and of the policy over masks, that only tests ask for."""

from __future__ import annotations

import torch
from torch import Tensor

from pgprune_cli.core.grid import Grid


def chain_length(grid: Grid) -> int:
    """Return the number of steps from the whole grid to nothing: the number of units of a width search."""
    return grid.elements if grid.is_line else grid.groups - grid.min_groups + -(-grid.members // grid.slot())


def is_regular(grid: Grid, mask: Tensor) -> bool:
    """Return whether all groups of which a mask `(elements,)` keeps something keep the same number of members."""
    counts = mask.view(grid.groups, grid.members).sum(1)
    return bool((counts[counts > 0] == counts.max()).all())


def log_probability(theta: Tensor, masks: Tensor) -> Tensor:
    """Return log p_θ(m) of masks `(K, n)`: `(K,)` nats."""
    return torch.where(masks, theta.log(), torch.log1p(-theta)).sum(-1)
