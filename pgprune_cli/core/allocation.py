"""From wanted keep fractions of the layers to whole widths that meet the budget and its limits."""

from __future__ import annotations

import torch
from torch import Tensor

from pgprune_cli.core.projection import project_onto
from pgprune_cli.core.space import Budget, MaskSpace


def widths_within(fractions: Tensor, space: MaskSpace, budget: Budget) -> Tensor:
    """Widths of every (family, layer) that come as near to the wanted fractions as the budget lets them.

    `fractions` `(J,)`, family-major, any real numbers, → units kept `(J,)` int64. Per constraint, all fractions are
    shifted by one ν and clipped to what the limits allow, so that the cost equals the budget: the exact solution of
    min Σ cost·count·(x − fraction)². Then x·count is rounded down to an allowed width (a multiple, or the whole count),
    and what that frees goes step by step to the layer that lacks the largest part of its next step, if it can pay it.

    Guaranteed: no constraint is exceeded; every width is allowed and not below its least; no layer's next allowed width
    would still fit; a width is less than a step below x·count, and a step or more above only when no layer that is
    below its own could pay its next step. With equal counts and costs and multiples that divide the counts, no other
    widths of that cost are nearer to the fractions. Layers alike in everything are served in their order.

    Raises ValueError where the least widths are above the budget.
    """
    least, multiples = budget.limits(space)
    widths = torch.zeros_like(space.pair_counts)
    for constraint in budget:
        inside = (space.pair_starts >= constraint.start) & (space.pair_starts < constraint.stop)
        pairs = (inside & (space.pair_counts > 0)).nonzero().squeeze(1)
        counts, costs, low = space.pair_counts[pairs], space.pair_costs[pairs], least[pairs]
        if (above := int((costs * low).sum()) - constraint.kept) > 0:
            raise ValueError(f"{constraint.name}: the least widths cost {above} more than the {constraint.kept} kept")
        wanted = project_onto(
            fractions[pairs].double(), (costs * counts).double(), constraint.kept, low.double() / counts
        )
        widths[pairs] = _whole(wanted * counts, counts, costs, low, multiples[pairs], constraint.kept)
    return widths


def _whole(wanted: Tensor, counts: Tensor, costs: Tensor, low: Tensor, multiples: Tensor, kept: int) -> Tensor:
    """Allowed widths `(m,)` int64 for the wanted ones, `(m,)` float64 of a total cost of `kept`."""
    # A hair below what is wanted, which is itself rounded: a step that was earned in full is the first to come back.
    down = ((wanted - 1e-9 * counts) / multiples).floor().long() * multiples
    widths = down.maximum(low).tolist()
    wants, tops, prices, steps = wanted.tolist(), counts.tolist(), costs.tolist(), multiples.tolist()
    room = kept - sum(price * width for price, width in zip(prices, widths, strict=True))

    def step(j: int) -> int:
        return int(min(steps[j], tops[j] - widths[j]))

    able = list(range(len(widths)))
    while able := [j for j in able if 0 < prices[j] * step(j) <= room]:
        chosen = max(able, key=lambda j: (wants[j] - widths[j]) / step(j))
        room -= prices[chosen] * step(chosen)
        widths[chosen] += step(chosen)
    return torch.tensor(widths, dtype=torch.int64)
