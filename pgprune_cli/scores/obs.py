"""Optimal brain surgeon on structures: greedy removal, each time repairing what stays.

SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774) with whole units in place of single weights, as in ZipLM (Kurtic
et al. 2023, arXiv 2302.04089). The layer-wise problem: the output projection W sees inputs with H = XᵀX; without the
units' columns, how far from WX must its output be, the other columns being free to make up for it?
"""

import torch
from torch import Tensor

from pgprune_cli.model.prunable import inputs_of
from pgprune_cli.scores.statistics import BlockStatistics

DAMPING = 1e-2
"""Ridge, relative to the mean of H's diagonal, as in SparseGPT. H alone may be singular (inputs that are never active,
fewer tokens than inputs), and columns that are collinear on the calibration text alone would seem free to remove."""


def obs(block: BlockStatistics) -> Tensor:
    """Error of the output projection by the time the unit is gone, in greedy order: `(units,)` float64.

    Relative to the residual stream, so that curves of different layers can be compared, and by how much the loss feels
    its directions (sensitivity.py). NaN where the covariance is not finite. Raises ValueError without it.
    """
    if block.covariance is None or block.error_root is None:
        raise ValueError("obs needs calibration text")
    if not block.covariance.isfinite().all():
        return torch.full((block.units,), torch.nan, dtype=torch.float64)
    weight = block.error_root.to(block.output_weight.device) @ block.output_weight.double()
    order, errors = removal_order(weight, block.covariance, block.units, units_a_round(block.units))
    return torch.empty_like(errors).scatter_(0, order, errors)


def units_a_round(units: int) -> int:
    """A hundredth of them, one by one where there are few."""
    return max(1, units // 100)


def removal_order(
    weight: Tensor, covariance: Tensor, units: int, block: int = 1, damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    """In which order the units of an output projection go, and what each step costs.

    Args:
        weight: `(out, in)`, any floating dtype; the `in` columns are `units` equal runs.
        covariance: `(in, in)`, second moments of the projection's inputs.
        units: how many.
        block: units removed a round. 1 is the exact greedy. With more, a round takes the units that are cheapest on
            their own, cheapest first; they are removed exactly, only that this choice did not see what they have in
            common. The errors are exact for the order in both cases.
        damping: λ, of H = covariance + λ · mean(diag) · I.

    Returns:
        order `(units,)` int64, first removed first, and errors `(units,)` float64, non-decreasing: after each removal
        the least tr((W − W') H (W − W')ᵀ) over all W' that are zero in every column removed so far. Both on the
        covariance's device, where at most about two float64 matrices `(in, in)` exist besides it.
    """
    width = weight.shape[1] // units
    columns = weight.to(covariance.device).T.double()  # (in, out): a row an input
    inverse = _damped_inverse(covariance, damping)
    left = torch.arange(units, device=covariance.device)
    order, steps = [], []
    while len(left):
        cheapest = _lone_errors(columns, inverse, width).argsort(stable=True)[:block]
        stays = torch.ones(len(left), dtype=torch.bool, device=left.device)
        stays[cheapest] = False
        gone, rest = inputs_of(cheapest, width), inputs_of(stays.nonzero().squeeze(1), width)
        # With LLᵀ = H⁻¹ of what goes: removing its inputs one after the other costs ‖row‖² of L⁻¹W each.
        factor = torch.linalg.cholesky(inverse[gone[:, None], gone])
        whitened = torch.linalg.solve_triangular(factor, columns[gone], upper=False)
        coupling = torch.linalg.solve_triangular(factor, inverse[gone[:, None], rest], upper=False)
        order.append(left[cheapest])
        steps.append(whitened.square().sum(1).unflatten(0, (-1, width)).sum(1))
        # The rest makes up for it (OBS), and its H⁻¹ is that of the smaller problem (Schur complement).
        columns = columns[rest].addmm_(coupling.T, whitened, alpha=-1)
        inverse = inverse[rest[:, None], rest].addmm_(coupling.T, coupling, alpha=-1)
        left = left[stays]
    return torch.cat(order), torch.cat(steps).cumsum(0)


def _damped_inverse(covariance: Tensor, damping: float) -> Tensor:
    hessian = covariance.double().clone()
    scale = hessian.diagonal().mean().clamp_min(1e-30)  # inputs that are all zero still have an inverse
    hessian.diagonal().add_(damping * scale)
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian))


def _lone_errors(columns: Tensor, inverse: Tensor, width: int) -> Tensor:
    """tr(W_g (H⁻¹_gg)⁻¹ W_gᵀ), what removing unit g alone costs next: `(units left,)`."""
    if width == 1:  # the same without a Cholesky factor for every channel
        return columns.square().sum(1) / inverse.diagonal()
    runs = columns.unflatten(0, (-1, width))
    own = torch.stack([inverse[i : i + width, i : i + width] for i in range(0, len(inverse), width)])
    return torch.cholesky_solve(runs @ runs.mT, torch.linalg.cholesky(own)).diagonal(dim1=1, dim2=2).sum(1)
