"""The equations of the repair: an output projection on some of its columns, refitted to all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pgprune_cli.core.grid import Partition
from pgprune_cli.forward.gram import cholesky
from pgprune_cli.forward.moments import Moments
from pgprune_cli.model.masks import RepairedBlock
from pgprune_cli.model.out_of_memory import or_on_cpu


class WidthProblem(NamedTuple):
    """A block to be solved at several widths.

    order: the units `(units,)` in which they are kept, first to last; partition: the unit of every element; widths:
    ascending numbers of units kept from the front of the order; root: R, an output error e costs ‖R e‖²;
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
    computation is in the dtype of the moments, on their device or, if its memory does not suffice, on the CPU. The
    weighted squared error on their text is at most that of no repair.
    """
    solve = partial(_fitted, damping=damping, with_bias=with_bias)
    solution, constant = or_on_cpu(solve, weight, moments.second, moments.first, columns)
    if not with_bias:
        return RepairedBlock(solution.to(weight), bias)
    constant = constant if bias is None else constant + bias.to(constant)
    return RepairedBlock(solution.to(weight), constant.to(weight))


def _fitted(
    weight: Tensor, second: Tensor, first: Tensor, columns: Tensor, *, damping: float, with_bias: bool
) -> tuple[Tensor, Tensor]:
    """Return the refitted projection `(hidden, kept)`, and what has to be added to its outputs `(hidden,)`."""
    if with_bias:
        second = second - torch.outer(first, first)
    removed = _others(columns, len(second))
    system = second[columns[:, None], columns]
    system.diagonal().add_(damping * second.diagonal().mean().clamp_min(1e-30))
    full = weight.to(second.dtype)
    # What the kept columns have to add to what they are, so that they make up for the removed ones.
    lost = second[columns[:, None], removed] @ full[:, removed].T
    solution = full[:, columns] + torch.cholesky_solve(lost, cholesky(system)).T
    return solution, full @ first - solution @ first[columns]


def compensated_output(weight: Tensor, bias: Tensor | None, moments: Moments, columns: Tensor) -> RepairedBlock:
    """Return FLAP's repair (An et al. 2024): the kept columns unchanged, and the mean of the removed ones as a bias."""
    removed = _others(columns, weight.shape[1])
    constant = weight[:, removed].to(moments.first.dtype) @ moments.first[removed]
    constant = constant if bias is None else constant + bias.to(constant.dtype)
    return RepairedBlock(weight[:, columns].clone(), constant.to(weight.dtype))


def _others(columns: Tensor, count: int) -> Tensor:
    """Return the columns that are not among some of `count`, ascending."""
    others = torch.ones(count, dtype=torch.bool, device=columns.device)
    others[columns] = False
    return others.nonzero().squeeze(1)


def solve_prefixes(
    weight: Tensor, second: Tensor, columns: Tensor, counts: Sequence[int], root: Tensor, damping: float, *, solve: bool
) -> tuple[Tensor, dict[int, Tensor]]:
    """Solve an output projection on the first n of its columns, for every n in `counts`, with one Cholesky factor.

    The columns are removed from the last one on, a run at a time, and each time the others make up for it. With
    C = L Lᵀ, W_k the k first rows of the transposed projection and W_b those of the run after them, W_k ← W_k +
    L_kk⁻ᵀ L_bkᵀ W_b, and that costs ‖R W_bᵀ L_bb‖².

    Args:
        weight: `(hidden, in)`.
        second: second moments of the inputs, `(in, in)`; the computation is in its dtype, on its device or, if memory
            does not suffice there, on the CPU.
        columns: `(in,)` int64, all columns in the order in which they are kept.
        root: R, an output error e costs ‖R e‖².
        damping: as in `repaired_output`.
        solve: refit the kept columns. Without it, the errors are those of the removal alone.

    Returns:
        errors `(counts,)` float64 on the CPU, and by n (0 < n < in) the projection, transposed: `(n, hidden)` with its
        inputs in the order of `columns`, in the dtype of the weight, on the CPU. Without `solve` there are none.
    """
    solve_all = partial(_solved_prefixes, counts=counts, damping=damping, solve=solve)
    return or_on_cpu(solve_all, weight, second, columns, root)


def _solved_prefixes(
    weight: Tensor, second: Tensor, columns: Tensor, root: Tensor, *, counts: Sequence[int], damping: float, solve: bool
) -> tuple[Tensor, dict[int, Tensor]]:
    root = root.to(second)
    ordered = second[columns[:, None], columns]
    ordered.diagonal().add_(damping * second.diagonal().mean().clamp_min(1e-30))
    kept = weight.to(second.dtype)[:, columns].T  # (in, hidden): one row per column
    if not solve:
        return _removal_errors(kept @ root.T, ordered, counts), {}
    factor = cholesky(ordered)
    del ordered
    steps, weights = {}, {}
    for first, last in _runs(counts, len(columns)):
        kept, removed = kept[:first], kept[first:last]
        steps[first] = (factor[first:last, first:last].T @ removed @ root.T).square().sum(dtype=torch.float64)
        if first:
            coupling = factor[first:last, :first].T
            coupling = torch.linalg.solve_triangular(factor[:first, :first].T, coupling, upper=True)
            kept = torch.addmm(kept, coupling, removed)
            weights[first] = kept.to(weight.dtype).cpu()
    return _summed(steps, counts), {count: weights[count] for count in sorted(weights)}


def _removal_errors(columns: Tensor, second: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the errors of keeping the first n columns as they are: `(counts,)` float64 on the CPU.

    columns: `(in, hidden)`, each times R; second: their second moments.
    """
    steps = {}
    for first, last in _runs(counts, len(columns)):
        moments = second[first:last, first:].clone()
        moments[:, last - first :] *= 2.0  # for the same below the diagonal
        steps[first] = (moments @ columns[first:] * columns[first:last]).sum(dtype=torch.float64)
    return _summed(steps, counts)


def _runs(counts: Sequence[int], columns: int) -> list[tuple[int, int]]:
    """Return first and last of the runs of columns between all `counts`, from the last run on."""
    ends = sorted({*counts, columns}, reverse=True)
    return list(zip(ends[1:], ends, strict=False))


def _summed(steps: Mapping[int, Tensor], counts: Sequence[int]) -> Tensor:
    """Return what all steps down to each count cost, `(counts,)` float64. steps: what each costs, by where it ends."""
    ends = sorted(steps, reverse=True)
    sums = torch.stack([steps[end] for end in ends]).cpu().cumsum(0).tolist() if ends else []
    totals = dict(zip(ends, sums, strict=True))
    return torch.tensor([totals.get(count, 0.0) for count in counts], dtype=torch.float64)
