"""Optimal brain surgeon on structures: greedy removal of units, each time with the rest refitted.

SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774) with whole units in place of single weights, as in ZipLM (Kurtic
et al. 2023, arXiv 2302.04089). The layer-wise problem: the output projection W sees inputs with H = XᵀX. Without the
columns of some units, and with the other columns free to make up for them, how far from WX is its output at best?
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pgprune_cli.core.grid import Candidate, Grid, GridCost, GridRemoval
from pgprune_cli.forward.expert_moments import ExpertMoments
from pgprune_cli.model.masks import columns_of
from pgprune_cli.scores.statistics import BlockStatistics

DAMPING = 1e-2
"""Ridge, relative to the mean of H's diagonal, as in SparseGPT. Without it, H may be singular (inputs that are never
active, fewer tokens than inputs), and columns that are collinear on the calibration text would look free to remove."""

EXPERT_ROUNDS = 32
"""In how many rounds the channels of an expert are removed. They are removed a sixteenth at a time in any case."""


def obs(block: BlockStatistics) -> Tensor:
    """Return the error of the output projection by the time each element is removed: `(elements,)` float64.

    The elements of a line are removed in greedy order. In a grid of several groups with several members, a step removes
    a whole group or one member of every group, whichever adds less error per parameter, and its elements have the same
    error. Errors are relative to the residual stream, so that layers can be compared, and weighted by how much the loss
    feels each direction (forward/curvature.py). The errors of experts are those within each expert, whose last element
    has the error of the whole expert. NaN if the covariance is not finite. Raises ValueError without a covariance.
    """
    if block.experts is not None:
        return expert_errors(block, block.experts)
    if block.covariance is None or block.error_root is None:
        raise ValueError("obs needs calibration text")
    elements = block.grid.elements
    if not block.covariance.isfinite().all():
        return torch.full((elements,), torch.nan, dtype=torch.float64)
    weight = block.error_root.to(block.output_weight.device) @ block.output_weight.double()
    if block.grid.is_line:
        order, errors = removal_order(weight, block.covariance, elements, units_per_round(elements))
        return torch.empty_like(errors).scatter_(0, order, errors)
    return chain_errors(weight, block.covariance, block.grid, block.cost)


def expert_errors(block: BlockStatistics, moments: ExpertMoments) -> Tensor:
    """Return the error of each expert by the time each of its channels is removed: `(experts · channels,)` float64."""
    if block.error_root is None:
        raise ValueError("obs needs calibration text")
    if not moments.second.isfinite().all():
        return torch.full((block.grid.elements,), torch.nan, dtype=torch.float64)
    weights = block.output_weight.unflatten(1, (block.grid.groups, block.grid.members))
    root = block.error_root.to(weights.device)
    errors = torch.empty(block.grid.groups, block.grid.members, dtype=torch.float64)
    for expert in range(block.grid.groups):
        order, values = expert_order(root @ weights[:, expert].double(), moments, expert)
        errors[expert, order] = values
        if block.output_bias is not None:  # it is removed with the expert's last channel
            errors[expert, order[-1]] = values[-1] + bias_error(
                weights[:, expert], block.output_bias, moments, expert, root
            )
    return errors.flatten()


def expert_order(weight: Tensor, moments: ExpertMoments, expert: int) -> tuple[Tensor, Tensor]:
    """Return the order in which channels of an expert are removed, and the errors: `(channels,)` each, on the CPU.

    weight: R W `(hidden, channels)` float64 of the expert.
    """
    channels = weight.shape[1]
    order, errors = removal_order(weight, moments.second[expert], channels, max(1, channels // EXPERT_ROUNDS))
    return order.cpu(), errors.cpu()


def bias_error(weight: Tensor, bias: Tensor, moments: ExpertMoments, expert: int, root: Tensor) -> float:
    """Return what an expert's output bias adds to the error of removing the expert, at least 0.

    weight: `(hidden, channels)`; bias: `(experts, hidden)`; root: R.
    """
    mean = root @ (weight.double() @ moments.first[expert].double())
    own = root @ bias[expert].double()
    return max(0.0, float(2 * own @ mean + moments.weight[expert].double() * own.square().sum()))


def chain_errors(
    weight: Tensor,
    covariance: Tensor,
    grid: Grid,
    cost: GridCost,
    target: tuple[int, int] = (0, 0),
    damping: float = DAMPING,
) -> Tensor:
    """Return the error by the time each element is removed along the chain: `(elements,)` float64, on the CPU.

    Each step adds the least error per cost. Errors rise strictly from step to step, so that equal errors mean the same
    step. The elements that `target` (groups, members) keeps have an infinite error.

    Args:
        weight, covariance, damping: as in `removal_order`.
        grid, cost: the elements, and what their rows cost.
        target: where to stop.
    """
    problem = Removal.start(weight, covariance, grid.elements, damping)
    removal = GridRemoval(grid, cost, target)
    errors = torch.full((grid.elements,), torch.inf, dtype=torch.float64)
    total = 0.0

    def group_errors() -> Tensor:
        groups = removal.groups.tolist()
        return torch.tensor([problem.error_of(removal.elements_of(group)) for group in groups], dtype=torch.float64)

    def slot() -> Candidate:
        alone = torch.full((grid.elements,), torch.inf, dtype=torch.float64)
        alone[problem.remaining.cpu()] = problem.lone_errors().cpu()
        members = alone.view(grid.groups, grid.members)[removal.groups].argmin(1)
        elements = removal.groups * grid.members + members
        return problem.error_of(elements), elements

    while not removal.is_finished:
        error, elements = removal.cheapest(group_errors, slot)
        problem.remove(elements)
        removal.remove(elements)
        total = max(total + error, math.nextafter(total, math.inf))
        errors[elements] = total
    return errors


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
    problem = Removal.start(weight, covariance, units, damping)
    order, steps = [], []
    while len(problem.remaining):
        cheapest = problem.lone_errors().argsort(stable=True)[:per_round]
        order.append(problem.remaining[cheapest])
        steps.append(problem.remove(problem.remaining[cheapest]))
    return torch.cat(order), torch.cat(steps).cumsum(0)


@dataclass
class Removal:
    """An output projection without some of its elements, whose other columns make up for them.

    columns: `(in', out)` float64, the refitted weight, a row per remaining input; inverse: `(in', in')` float64, H⁻¹ of
    the remaining inputs; remaining: `(n,)` int64, the remaining elements, in order; width: inputs of an element.
    """

    columns: Tensor
    inverse: Tensor
    remaining: Tensor
    width: int

    @classmethod
    def start(cls, weight: Tensor, covariance: Tensor, elements: int, damping: float) -> Removal:
        """Begin with all elements. The arguments are those of `removal_order`."""
        columns = weight.to(covariance.device).T.double()  # (in, out): one row per input
        inverse = _damped_inverse(covariance, damping)
        return cls(columns, inverse, torch.arange(elements, device=covariance.device), weight.shape[1] // elements)

    def lone_errors(self) -> Tensor:
        """Return the cost of removing each remaining element alone, `(n,)` float64."""
        return _lone_errors(self.columns, self.inverse, self.width)

    def error_of(self, elements: Tensor) -> float:
        """Return the cost of removing these remaining elements `(k,)` together."""
        rows = columns_of(self._places(elements), self.width)
        factor = torch.linalg.cholesky(self.inverse[rows[:, None], rows])
        whitened = torch.linalg.solve_triangular(factor, self.columns[rows], upper=False)
        return float(whitened.square().sum())

    def remove(self, elements: Tensor) -> Tensor:
        """Remove remaining elements `(k,)` one after the other, and return what each removal costs, `(k,)` float64."""
        places = self._places(elements)
        kept = torch.ones(len(self.remaining), dtype=torch.bool, device=self.remaining.device)
        kept[places] = False
        removed, rest = columns_of(places, self.width), columns_of(kept.nonzero().squeeze(1), self.width)
        # With LLᵀ = H⁻¹ of the removed inputs, removing them one after the other costs ‖row‖² of L⁻¹W each.
        factor = torch.linalg.cholesky(self.inverse[removed[:, None], removed])
        whitened = torch.linalg.solve_triangular(factor, self.columns[removed], upper=False)
        coupling = torch.linalg.solve_triangular(factor, self.inverse[removed[:, None], rest], upper=False)
        # The rest makes up for them (OBS), and its H⁻¹ becomes that of the smaller problem (Schur complement).
        self.columns = self.columns[rest].addmm_(coupling.T, whitened, alpha=-1)
        self.inverse = self.inverse[rest[:, None], rest].addmm_(coupling.T, coupling, alpha=-1)
        self.remaining = self.remaining[kept]
        costs: Tensor = whitened.square().sum(1).unflatten(0, (-1, self.width)).sum(1)
        return costs

    def _places(self, elements: Tensor) -> Tensor:
        """Return where elements are among those that remain."""
        return torch.searchsorted(self.remaining, elements.to(self.remaining.device))


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
