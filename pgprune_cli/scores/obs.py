"""Optimal brain surgeon on structures: greedy removal of units, each time with the rest refitted.

SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774) with whole units in place of single weights, as in ZipLM (Kurtic
et al. 2023, arXiv 2302.04089). The layer-wise problem: the output projection W sees inputs with H = XᵀX. Without the
columns of some units, and with the other columns free to make up for them, how far from WX is its output at best?
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from pgprune_cli.core.grid import Candidate, Grid, GridCost, GridRemoval
from pgprune_cli.forward.expert_moments import ExpertMoments
from pgprune_cli.model.masks import columns_of
from pgprune_cli.model.out_of_memory import or_on_cpu
from pgprune_cli.scores.statistics import BlockStatistics

Solution = TypeVar("Solution")

DAMPING = 1e-2
"""Ridge, relative to the mean of H's diagonal, as in SparseGPT. Without it, H may be singular (inputs that are never
active, fewer tokens than inputs), and columns that are collinear on the calibration text would look free to remove."""

SHRINK = 0.75
"""The matrices of a removal are copied without what has been removed once only this fraction of them remains."""

EXPERT_ROUNDS = 32
"""In how many rounds the channels of an expert are removed. They are removed a sixteenth at a time in any case."""


def obs(block: BlockStatistics) -> Tensor:
    """Return the error of the output projection by the time each element is removed: `(elements,)` float64.

    The elements of a line are removed in greedy order. In a grid of several groups with several members, a step removes
    a whole group or one member of every group, whichever adds less error per parameter, and its elements have the same
    error. Errors are relative to the residual stream, so that layers can be compared, and weighted by how much an error
    in each direction raises the loss (forward/curvature.py). The errors of experts are those within each expert, whose
    last element has the error of the whole expert. NaN if the covariance is not finite. Raises ValueError without a
    covariance.
    """
    if block.experts is not None:
        return expert_errors(block, block.experts)
    if block.covariance is None or block.error_root is None:
        raise ValueError("obs needs calibration text")
    elements = block.grid.elements
    if not block.covariance.isfinite().all():
        return torch.full((elements,), torch.nan, dtype=torch.float64)
    weight = block.error_root.to(block.output_weight.device) @ block.output_weight.to(block.error_root.dtype)
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
        order, values = expert_order(root @ weights[:, expert].to(root.dtype), moments, expert)
        errors[expert, order] = values
        if block.output_bias is not None:  # it is removed with the expert's last channel
            first, tokens = moments.first[expert], moments.weight[expert]
            added = bias_error(weights[:, expert], block.output_bias[expert], first, root, tokens)
            errors[expert, order[-1]] = values[-1] + added
    return errors.flatten()


def expert_order(weight: Tensor, moments: ExpertMoments, expert: int) -> tuple[Tensor, Tensor]:
    """Return the order in which channels of an expert are removed, and the errors: `(channels,)` each, on the CPU.

    weight: R W `(hidden, channels)` of the expert.
    """
    channels = weight.shape[1]
    return removal_order(weight, moments.second[expert], channels, max(1, channels // EXPERT_ROUNDS))


def bias_error(weight: Tensor, bias: Tensor, first: Tensor, root: Tensor, tokens: Tensor | float = 1.0) -> float:
    """Return what an output bias adds to the error of removing a whole block or expert, at least 0.

    weight: `(hidden, channels)`; bias: `(hidden,)`; first: first moments of the inputs, `(channels,)`; root: R; tokens:
    the sum of the weights of the tokens that the moments are of.
    """
    root = root.double()
    mean = root @ (weight.double() @ first.double())
    own = root @ bias.double()
    return max(0.0, float(2 * own @ mean) + float(tokens) * float(own @ own))


def chain_errors(
    weight: Tensor,
    covariance: Tensor,
    grid: Grid,
    cost: GridCost,
    target: tuple[int, int] = (0, 0),
) -> Tensor:
    """Return the error by the time each element is removed along the chain: `(elements,)` float64, on the CPU.

    Each step adds the least error per cost. Errors rise strictly from step to step, so that equal errors mean the same
    step. The elements that `target` (groups, members) keeps have an infinite error.

    Args:
        weight, covariance: as in `removal_order`.
        grid, cost: the elements, and what their rows cost.
        target: where to stop.
    """

    def solve(weight: Tensor, covariance: Tensor) -> Tensor:
        return _chain_errors(Removal.start(weight, covariance, grid.elements, DAMPING), grid, cost, target)

    return or_on_cpu(partial(_exactly_if_needed, solve), weight, covariance)


def _chain_errors(problem: Removal, grid: Grid, cost: GridCost, target: tuple[int, int]) -> Tensor:
    removal = GridRemoval(grid, cost, target)
    errors = torch.full((grid.elements,), torch.inf, dtype=torch.float64)
    total = 0.0

    def group_errors() -> Tensor:
        groups = removal.groups.tolist()
        return torch.tensor([problem.error_of(removal.elements_of(group)) for group in groups], dtype=torch.float64)

    def slot() -> Candidate:
        alone = torch.full((grid.elements,), torch.inf, dtype=torch.float64)
        alone[problem.remaining.cpu()] = problem.lone_errors().cpu().double()
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
        the least tr((W − W') H (W − W')ᵀ) over all W' that are zero in every removed column. Both are on the CPU. The
        computation is in the dtype of the covariance. At most three more such matrices exist on its device. If they do
        not fit, the CPU computes.
    """

    def solve(weight: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        return _removal_order(Removal.start(weight, covariance, units, damping), per_round)

    return or_on_cpu(partial(_exactly_if_needed, solve), weight, covariance)


def _removal_order(problem: Removal, per_round: int) -> tuple[Tensor, Tensor]:
    order, steps = [], []
    while len(problem.remaining):
        cheapest = problem.lone_errors().argsort(stable=True)[:per_round]
        order.append(problem.remaining[cheapest])
        steps.append(problem.remove(problem.remaining[cheapest]))
    return torch.cat(order).cpu(), torch.cat(steps).cpu().double().cumsum(0)


def _exactly_if_needed(solve: Callable[[Tensor, Tensor], Solution], weight: Tensor, covariance: Tensor) -> Solution:
    """Return what `solve` makes of a covariance, or of its copy in float64 where it is too ill-conditioned."""
    try:
        return solve(weight, covariance)
    except torch.linalg.LinAlgError:
        if covariance.dtype == torch.float64:
            raise
    return solve(weight, covariance.double())


@dataclass
class Removal:
    """An output projection without some of its elements, whose other columns make up for them.

    Removed elements stay in the matrices for a while: copying what is left takes longer than computing with them.

    columns: `(in', out)`, the refitted weight, a row per stored input; inverse: `(in', in')`, H⁻¹ of the remaining
    inputs, zero for others, in the same dtype; stored: `(m,)` int64, the stored elements, in order; places: `(n,)`
    int64, which of them remain, in order; width: inputs of an element.
    """

    columns: Tensor
    inverse: Tensor
    stored: Tensor
    places: Tensor
    width: int

    @classmethod
    def start(cls, weight: Tensor, covariance: Tensor, elements: int, damping: float) -> Removal:
        """Begin with all elements. The arguments are those of `removal_order`."""
        columns = weight.to(covariance).T.clone(memory_format=torch.contiguous_format)  # (in, out): one row per input
        every = torch.arange(elements, device=covariance.device)
        return cls(columns, _damped_inverse(covariance, damping), every, every, weight.shape[1] // elements)

    @property
    def remaining(self) -> Tensor:
        """The remaining elements `(n,)` int64, in order."""
        return self.stored[self.places]

    def lone_errors(self) -> Tensor:
        """Return the cost tr(W_g (H⁻¹_gg)⁻¹ W_gᵀ) of removing each remaining element g alone, `(n,)`."""
        if self.width == 1:  # the same, without a Cholesky factor for every channel
            return (self.columns.square().sum(1) / self.inverse.diagonal())[self.places]
        # (width, width, stored): the last axis is where rows and columns are of the same element
        own = self.inverse.unflatten(1, (-1, self.width)).unflatten(0, (-1, self.width)).diagonal(dim1=0, dim2=2)
        factors = torch.linalg.cholesky(own.movedim(2, 0)[self.places])
        columns = self.columns.unflatten(0, (-1, self.width))[self.places]
        whitened = torch.linalg.solve_triangular(factors, columns, upper=False)
        errors: Tensor = whitened.square().sum((1, 2))
        return errors

    def error_of(self, elements: Tensor) -> float:
        """Return the cost of removing these remaining elements `(k,)` together."""
        _, _, whitened = self._whitened(elements)
        return float(whitened.square().sum())

    def remove(self, elements: Tensor) -> Tensor:
        """Remove remaining elements `(k,)` one after the other, and return what each removal costs, `(k,)`."""
        rows, factor, whitened = self._whitened(elements)
        coupling = torch.linalg.solve_triangular(factor, self.inverse[rows], upper=False)
        # The rest makes up for them (OBS), and its H⁻¹ becomes that of the smaller problem (Schur complement).
        self.columns.addmm_(coupling.T, whitened, alpha=-1)
        self.inverse.addmm_(coupling.T, coupling, alpha=-1)
        remain = ~torch.isin(self.remaining, elements.to(self.stored.device))
        self.places = self.places[remain]
        if must_shrink(len(self.stored), len(self.places)):
            inputs = columns_of(self.places, self.width)
            self.columns = self.columns[inputs]
            self.inverse = self.inverse[inputs][:, inputs]
            self.stored = self.stored[self.places]
            self.places = torch.arange(len(self.stored), device=self.stored.device)
        costs: Tensor = whitened.square().sum(1).unflatten(0, (-1, self.width)).sum(1)
        return costs

    def _whitened(self, elements: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the inputs of remaining elements, L with LLᵀ their H⁻¹, and L⁻¹W.

        Removing the inputs one after the other costs the squared length of one row of L⁻¹W each.
        """
        rows = columns_of(torch.searchsorted(self.stored, elements.to(self.stored.device)), self.width)
        factor = torch.linalg.cholesky(self.inverse[rows[:, None], rows])
        return rows, factor, torch.linalg.solve_triangular(factor, self.columns[rows], upper=False)


def must_shrink(stored: int, remaining: int) -> bool:
    """Return whether `stored` stored elements have to be replaced by the `remaining` ones."""
    return remaining <= SHRINK * stored


def _damped_inverse(covariance: Tensor, damping: float) -> Tensor:
    hessian = covariance.clone()
    scale = hessian.diagonal().mean().clamp_min(1e-30)  # so that inputs that are all zero have an inverse, too
    hessian.diagonal().add_(damping * scale)
    factor, failed = torch.linalg.cholesky_ex(hessian, check_errors=hessian.dtype != torch.float64)
    if failed and not hessian.isfinite().all():
        raise torch.linalg.LinAlgError("the covariance is not finite")
    while failed:  # sums of rounded products can be slightly indefinite: then the ridge is increased
        hessian.diagonal().add_(damping * scale)
        factor, failed = torch.linalg.cholesky_ex(hessian)
    del hessian
    # In place: torch.cholesky_inverse would hold one more matrix, and on CUDA two.
    inverse = torch.eye(len(factor), dtype=factor.dtype, device=factor.device).T
    torch.linalg.solve_triangular(factor, inverse, upper=False, out=inverse)
    torch.linalg.solve_triangular(factor.T, inverse, upper=True, out=inverse)
    return inverse
