"""The equations of the repair: an output projection on some of its columns, refitted to all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pgprune_cli.core.grid import Partition
from pgprune_cli.errors import RunError
from pgprune_cli.forward.moments import Moments
from pgprune_cli.model.masks import RepairedBlock


class WidthProblem(NamedTuple):
    """A block to be solved at several widths.

    order: the units `(units,)` in which they are kept, first to last; partition: the unit of every element; widths:
    ascending numbers of units kept from the front of the order; root: R, float64, an output error e costs ‖R e‖²;
    damping: as in `repaired_output`.
    """

    order: Tensor
    partition: Partition
    widths: Sequence[int]
    root: Tensor
    damping: float


def repaired_output(
    weight: Tensor, bias: Tensor | None, moments: Moments, columns: Tensor, damping: float, *, with_bias: bool
) -> RepairedBlock:
    """Return the output projection on its kept `columns` (int64, ascending), refitted to `weight` `(hidden, in)`.

    damping: λ as a fraction of the mean of C's diagonal; with_bias: fit a constant too (the moments are centred). The
    computation is in float64. The weighted squared error on the text of the moments is at most that of no repair.
    """
    full = weight.double()
    second = moments.second
    if with_bias:
        second = second - torch.outer(moments.first, moments.first)
    ridge = damping * second.diagonal().mean().clamp_min(1e-30)
    system = second[columns][:, columns] + ridge * torch.eye(len(columns), dtype=torch.float64, device=second.device)
    right = second[columns] @ full.T + ridge * full[:, columns].T
    solution = torch.cholesky_solve(right, cholesky(system)).T
    if not with_bias:
        return RepairedBlock(solution.to(weight.dtype), bias)
    constant = full @ moments.first - solution @ moments.first[columns]
    constant = constant if bias is None else constant + bias.double()
    return RepairedBlock(solution.to(weight.dtype), constant.to(weight.dtype))


def compensated_output(weight: Tensor, bias: Tensor | None, moments: Moments, columns: Tensor) -> RepairedBlock:
    """Return FLAP's repair (An et al. 2024): the kept columns unchanged, and the mean of the removed ones as a bias."""
    removed = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    removed[columns] = False
    constant = weight[:, removed].double() @ moments.first[removed]
    constant = constant if bias is None else constant + bias.double()
    return RepairedBlock(weight[:, columns].clone(), constant.to(weight.dtype))


def cholesky(system: Tensor) -> Tensor:
    """Return the lower Cholesky factor. Moments in float32 can be slightly indefinite: then the ridge is increased.

    Raises RunError if the system is not finite.
    """
    if not system.isfinite().all():
        raise RunError("the activations on the calibration text are not finite. Try dtype float32 or bfloat16.")
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(system)
    extra = system.diagonal().mean() * 1e-6
    while failed:
        system = system + extra * torch.eye(len(system), dtype=system.dtype, device=system.device)
        factor, failed = torch.linalg.cholesky_ex(system)
        extra = extra * 10
    return factor


def solve_prefixes(
    weight: Tensor, second: Tensor, columns: Tensor, counts: Sequence[int], root: Tensor, damping: float, *, solve: bool
) -> tuple[Tensor, dict[int, Tensor]]:
    """Solve an output projection on the first n of its columns, for every n in `counts`, with one Cholesky factor.

    Args:
        weight: `(hidden, in)`.
        second: second moments of the inputs, `(in, in)` float64.
        columns: `(in,)` int64, all columns in the order in which they are kept.
        root: R, float64: an output error e costs ‖R e‖².
        damping: as in `repaired_output`.
        solve: refit the kept columns. Without it, the errors are those of the removal alone.

    Returns:
        errors `(counts,)` float64, and by n (0 < n < in) the projection, transposed: `(n, hidden)` with its inputs
        ascending, in the dtype of the weight, on the CPU. Without `solve` there are no projections.
    """
    full, root = weight.double(), root.to(weight.device)
    ridge = damping * second.diagonal().mean().clamp_min(1e-30)
    ordered = second[columns][:, columns] + ridge * torch.eye(len(columns), dtype=torch.float64, device=second.device)
    ordered_weight = full[:, columns]
    weighted = root @ ordered_weight
    if not solve:
        rests = [(weighted[:, kept:], ordered[kept:, kept:]) for kept in counts]
        return torch.stack([(rest @ moments * rest).sum() for rest, moments in rests]), {}
    whole = (weighted @ ordered * weighted).sum()
    factor = cholesky(ordered)
    forward = torch.linalg.solve_triangular(factor, ordered @ ordered_weight.T, upper=False)  # (in, hidden)
    explained = (forward @ root.T).square().sum(1).cumsum(0)  # R is not symmetric if a norm follows the block
    errors, weights = [], {}
    for kept in counts:
        errors.append(whole - explained[kept - 1] if kept else whole)
        if 0 < kept < len(columns) and kept not in weights:
            solution = torch.linalg.solve_triangular(factor[:kept, :kept].T, forward[:kept], upper=True)
            weights[kept] = solution[columns[:kept].argsort()].to(weight.dtype).cpu()
    return torch.stack(errors), weights
