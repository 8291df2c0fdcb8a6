"""Optimal brain surgeon on structures: greedy removal of units, each time with the rest refitted.

SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774) with whole units in place of single weights, as in ZipLM (Kurtic
et al. 2023, arXiv 2302.04089). The layer-wise problem: the output projection W sees inputs with H = XᵀX. Without the
columns of some units, and with the other columns free to make up for them, how far from WX is its output at best?
"""

import torch
from torch import Tensor

from pgprune_cli.model.masks import columns_of
from pgprune_cli.scores.statistics import BlockStatistics

DAMPING = 1e-2
"""Ridge, relative to the mean of H's diagonal, as in SparseGPT. Without it, H may be singular (inputs that are never
active, fewer tokens than inputs), and columns that are collinear on the calibration text would look free to remove."""


def obs(block: BlockStatistics) -> Tensor:
    """Return the error of the output projection by the time each unit is removed, in greedy order: `(units,)` float64.

    Errors are relative to the residual stream, so that layers can be compared, and weighted by how much the loss feels
    each direction (forward/curvature.py). NaN if the covariance is not finite. Raises ValueError without a covariance.
    """
    if block.covariance is None or block.error_root is None:
        raise ValueError("obs needs calibration text")
    if not block.covariance.isfinite().all():
        return torch.full((block.units,), torch.nan, dtype=torch.float64)
    weight = block.error_root.to(block.output_weight.device) @ block.output_weight.double()
    order, errors = removal_order(weight, block.covariance, block.units, units_per_round(block.units))
    return torch.empty_like(errors).scatter_(0, order, errors)


def units_per_round(units: int) -> int:
    """Return how many units to remove per round: a hundredth of them, and one by one if there are few."""
    return max(1, units // 100)


def removal_order(
    weight: Tensor, covariance: Tensor, units: int, per_round: int = 1, damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    """Return the order in which the units of an output projection are removed, and what each removal costs.

    Args:
        weight: `(out, in)`, any floating dtype; the `in` columns are `units` runs of equal width.
        covariance: `(in, in)`, second moments of the projection's inputs.
        units: how many units there are.
        per_round: units removed per round. 1 is the exact greedy. With more, a round removes the units that are
            cheapest on their own, cheapest first. They are removed exactly, only their choice ignores what they have in
            common. The errors are exact for the order in both cases.
        damping: λ in H = covariance + λ · mean(diag) · I.

    Returns:
        order `(units,)` int64, first removed first, and errors `(units,)` float64, non-decreasing: after each removal
        the least tr((W − W') H (W − W')ᵀ) over all W' that are zero in every removed column. Both are on the
        covariance's device, where at most about two more float64 matrices `(in, in)` exist.
    """
    width = weight.shape[1] // units
    columns = weight.to(covariance.device).T.double()  # (in, out): one row per input
    inverse = _damped_inverse(covariance, damping)
    remaining = torch.arange(units, device=covariance.device)
    order, steps = [], []
    while len(remaining):
        cheapest = _lone_errors(columns, inverse, width).argsort(stable=True)[:per_round]
        kept = torch.ones(len(remaining), dtype=torch.bool, device=remaining.device)
        kept[cheapest] = False
        removed, rest = columns_of(cheapest, width), columns_of(kept.nonzero().squeeze(1), width)
        # With LLᵀ = H⁻¹ of the removed inputs, removing them one after the other costs ‖row‖² of L⁻¹W each.
        factor = torch.linalg.cholesky(inverse[removed[:, None], removed])
        whitened = torch.linalg.solve_triangular(factor, columns[removed], upper=False)
        coupling = torch.linalg.solve_triangular(factor, inverse[removed[:, None], rest], upper=False)
        order.append(remaining[cheapest])
        steps.append(whitened.square().sum(1).unflatten(0, (-1, width)).sum(1))
        # The rest makes up for them (OBS), and its H⁻¹ becomes that of the smaller problem (Schur complement).
        columns = columns[rest].addmm_(coupling.T, whitened, alpha=-1)
        inverse = inverse[rest[:, None], rest].addmm_(coupling.T, coupling, alpha=-1)
        remaining = remaining[kept]
    return torch.cat(order), torch.cat(steps).cumsum(0)


def _damped_inverse(covariance: Tensor, damping: float) -> Tensor:
    hessian = covariance.double().clone()
    scale = hessian.diagonal().mean().clamp_min(1e-30)  # so that inputs that are all zero have an inverse, too
    hessian.diagonal().add_(damping * scale)
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian))


def _lone_errors(columns: Tensor, inverse: Tensor, width: int) -> Tensor:
    """Return tr(W_g (H⁻¹_gg)⁻¹ W_gᵀ), the cost of removing unit g alone: `(remaining units,)`."""
    if width == 1:  # the same, without a Cholesky factor for every channel
        return columns.square().sum(1) / inverse.diagonal()
    runs = columns.unflatten(0, (-1, width))
    own = torch.stack([inverse[i : i + width, i : i + width] for i in range(0, len(inverse), width)])
    return torch.cholesky_solve(runs @ runs.mT, torch.linalg.cholesky(own)).diagonal(dim1=1, dim2=2).sum(1)
