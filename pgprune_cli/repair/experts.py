"""Repair of experts: the kept channels of every expert, refitted to the expert's own output on its routed tokens.

The weights of an expert that has seen too few tokens stay as they are. A fit to a handful of tokens would be worse than
none on all others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pgprune_cli.core.grid import Grid, element_order
from pgprune_cli.forward.expert_moments import ExpertMoments
from pgprune_cli.forward.moments import Moments
from pgprune_cli.model.families.adapter import ModelFamily
from pgprune_cli.model.families.experts import ExpertsFamily
from pgprune_cli.model.masks import RepairedBlock
from pgprune_cli.repair.equations import WidthProblem, repaired_output, solve_prefixes
from pgprune_cli.scores.obs import bias_error, expert_order

CHANNELS_PER_TOKEN = 4
"""An expert is repaired if it has seen at least one token for every CHANNELS_PER_TOKEN of its channels."""


def has_enough_tokens(moments: ExpertMoments) -> Tensor:
    """Return which experts have seen enough tokens to be repaired, `(experts,)` bool."""
    return moments.tokens * CHANNELS_PER_TOKEN >= moments.first.shape[1]


def has_too_few_tokens(moments: ExpertMoments, mask: Tensor, grid: Grid) -> list[int]:
    """Return the experts that a mask `(elements,)` keeps and that have seen too few tokens to be repaired."""
    few: list[int] = (grid.kept_groups(mask) & ~has_enough_tokens(moments)).nonzero().squeeze(1).tolist()
    return few


def repaired_experts(
    family: ModelFamily, layer: nn.Module, mask: Tensor, grid: Grid, moments: ExpertMoments, damping: float
) -> RepairedBlock:
    """Return the output projections of the kept experts on their kept channels, as the model stores them.

    mask: `(experts · channels,)` bool, regular; damping: λ as a fraction of the mean of each expert's diagonal. The
    weighted squared error of an expert on its tokens is at most that of no repair.
    """
    assert isinstance(family, ExpertsFamily)
    weights, _ = family.output_parts(layer)
    enough, kept = has_enough_tokens(moments), mask.view(grid.groups, grid.members)
    solved = []
    for expert in grid.kept_groups(mask).nonzero().squeeze(1).tolist():
        columns = kept[expert].nonzero().squeeze(1).to(weights.device)
        if enough[expert]:
            own = _moments_of(moments, expert)
            solved.append(repaired_output(weights[expert], None, own, columns, damping, with_bias=False).weight)
        else:
            solved.append(weights[expert][:, columns])
    return RepairedBlock(family.stored_output(torch.stack(solved)), None)


def reselected_experts(
    family: ModelFamily, layer: nn.Module, mask: Tensor, grid: Grid, moments: ExpertMoments, root: Tensor
) -> Tensor:
    """Return a mask of as many experts and channels as `mask` `(elements,)` keeps, chosen again with `obs`.

    The error of a choice adds up over experts: a kept one loses its cheapest channels, a removed one all of its output.
    """
    assert isinstance(family, ExpertsFamily)
    experts, channels = grid.kept(mask)
    weights, bias = family.output_parts(layer)
    root, removed = root.to(weights.device), grid.members - channels
    chosen = torch.zeros(grid.groups, grid.members, dtype=torch.bool)
    saved = torch.zeros(grid.groups, dtype=torch.float64)
    for expert in range(grid.groups):
        order, errors = expert_order(root @ weights[expert].to(root.dtype), moments, expert)
        chosen[expert, order[removed:]] = True
        saved[expert] = errors[-1] - (errors[removed - 1] if removed else 0.0)
        if bias is not None:
            saved[expert] += bias_error(
                weights[expert], bias[expert], moments.first[expert], root, moments.weight[expert]
            )
    kept = torch.zeros(grid.groups, dtype=torch.bool)
    kept[saved.argsort(descending=True, stable=True)[:experts]] = True
    return (chosen & kept[:, None]).flatten()


def solve_expert_widths(
    family: ModelFamily,
    layer: nn.Module,
    moments: ExpertMoments,
    problem: WidthProblem,
    *,
    solve: bool,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Solve all experts of a layer at the widths of a problem. solve: as in `solve_layers`.

    Returns the errors `(widths,)` float64 on the CPU, and by the number of kept elements the output projections as the
    model stores them, on the CPU, for widths at which experts lose channels. Experts and channels are in the order of
    `element_order`.
    """
    assert isinstance(family, ExpertsFamily)
    order, partition, widths, root, damping = problem
    weights, bias = family.output_parts(layer)
    experts, _, channels = weights.shape
    rank = order.argsort()[partition].view(experts, channels)  # the place of every element's unit in the order
    by_expert = element_order(partition, order, Grid(experts, channels)).view(experts, channels)
    kept = torch.stack([(rank < width).sum(1) for width in widths])  # (widths, experts)
    enough = has_enough_tokens(moments)
    errors = torch.zeros(len(widths), dtype=torch.float64)
    solved: dict[int, list[Tensor]] = {}
    for elements_of_expert in by_expert:
        expert, columns = int(elements_of_expert[0]) // channels, (elements_of_expert % channels).to(weights.device)
        weight = weights[expert]
        counts: list[int] = kept[:, expert].tolist()
        second, refit = moments.second[expert], solve and bool(enough[expert])
        own, fitted = solve_prefixes(weight, second, columns, counts, root, damping, solve=refit)
        errors += own
        if bias is not None:
            first, tokens = moments.first[expert], moments.weight[expert]
            added = bias_error(weight, bias[expert], first, root.to(weight.device), tokens)
            errors[kept[:, expert] == 0] += added
        for count, elements in zip(counts, kept.sum(1).tolist(), strict=True):
            if solve and 0 < count < channels:
                unchanged = weight[:, columns[:count]].cpu()
                solved.setdefault(elements, []).append(fitted[count].T if refit else unchanged)
    return errors, {elements: family.stored_output(torch.stack(parts)) for elements, parts in solved.items()}


def _moments_of(moments: ExpertMoments, expert: int) -> Moments:
    """Return the moments of one expert."""
    return Moments(moments.second[expert], moments.first[expert], moments.weight[expert])
