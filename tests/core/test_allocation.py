"""Whole widths from wanted fractions: against every choice there is, and against what they promise."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_projection import FRACTIONS, allowed_widths, limited
from torch import Tensor

from pgprune_cli.core.allocation import widths_within
from pgprune_cli.core.projection import project_onto
from pgprune_cli.core.space import Budget, Constraint, Family, MaskSpace, budget_of

WANTED = st.lists(st.one_of(st.integers(-4, 8).map(lambda k: k / 4), st.floats(-1, 2)), min_size=8, max_size=8)


def constraint_of(space: MaskSpace, budget: Budget, pair: int) -> Constraint:
    return next(c for c in budget if c.start <= int(space.pair_starts[pair]) < c.stop)


def room_left(widths: Tensor, space: MaskSpace, budget: Budget) -> dict[str, int]:
    """What each constraint has left."""
    room = {constraint.name: constraint.kept for constraint in budget}
    for pair, width in enumerate(widths.tolist()):
        if width:
            room[constraint_of(space, budget, pair).name] -= width * int(space.pair_costs[pair])
    return room


def continuous(fractions: Tensor, space: MaskSpace, budget: Budget) -> dict[int, float]:
    """x·count of every pair with units: the exact solution before anything is rounded."""
    least, counts = budget.limits(space)[0], space.pair_counts
    found = {}
    for constraint in budget:
        pairs = [p for p in range(len(counts)) if counts[p] and constraint_of(space, budget, p) is constraint]
        count = counts[pairs].double()
        x = project_onto(
            fractions[pairs], space.pair_costs[pairs] * count, constraint.kept, least[pairs].double() / count
        )
        found |= dict(zip(pairs, (x * count).tolist(), strict=True))
    return found


@given(limited(), WANTED)
@settings(deadline=None, max_examples=300)
def test_widths_keep_to_budget_and_limits_and_no_next_width_would_fit(problem, wanted: list[float]) -> None:
    space, _, budget = problem
    fractions = torch.tensor(wanted[: len(space.pair_counts)], dtype=torch.float64)
    widths = widths_within(fractions, space, budget)
    assert widths.dtype == torch.int64
    room = room_left(widths, space, budget)
    assert min(room.values()) >= 0
    exact = continuous(fractions, space, budget)
    for pair, (width, may) in enumerate(zip(widths.tolist(), allowed_widths(space, budget), strict=True)):
        assert width in may
        if not space.pair_counts[pair]:
            continue
        left, cost = room[constraint_of(space, budget, pair).name], int(space.pair_costs[pair])
        assert all((wider - width) * cost > left for wider in may if wider > width)
        assert exact[pair] - width < next((wider for wider in may if wider > width), width + 1) - width + 1e-6


@given(limited(layers=2, units=5), WANTED)
@settings(deadline=None, max_examples=100)
def test_no_other_widths_keep_as_much_of_every_layer_and_more_of_one(problem, wanted: list[float]) -> None:
    space, _, budget = problem
    fractions = torch.tensor(wanted[: len(space.pair_counts)], dtype=torch.float64)
    widths = widths_within(fractions, space, budget)
    for other in product(*allowed_widths(space, budget)):
        more = torch.tensor(other)
        if (more >= widths).all() and (more > widths).any():
            assert min(room_left(more, space, budget).values()) < 0


@given(
    layers=st.integers(1, 4),
    bundles=st.integers(1, 5),
    multiple=st.integers(1, 3),
    cost=st.integers(1, 50),
    sparsity=FRACTIONS,
    least=FRACTIONS,
    wanted=WANTED,
)
@settings(deadline=None, max_examples=200)
def test_among_layers_alike_no_widths_of_the_cost_are_nearer(
    layers: int, bundles: int, multiple: int, cost: int, sparsity: float, least: float, wanted: list[float]
) -> None:
    """Against every choice of widths: the largest remainders minimise the distance once the total is fixed."""
    space = MaskSpace((Family("ffn", (bundles * multiple,) * layers, (cost,) * layers),))
    budget = budget_of(space, sparsity, "global", least, {"ffn": multiple})
    if budget.needed(space)[0] > budget.constraints[0].kept:
        budget = budget_of(space, sparsity, "global", 0.0, {"ffn": multiple})
    fractions = torch.tensor(wanted[:layers], dtype=torch.float64)
    widths = widths_within(fractions, space, budget)

    def distance(chosen: Tensor) -> float:
        return float((chosen / space.pair_counts - fractions).square().sum())

    choices = [torch.tensor(choice) for choice in product(*allowed_widths(space, budget))]
    same_cost = [choice for choice in choices if int(choice.sum()) == int(widths.sum())]
    assert distance(widths) == pytest.approx(min(map(distance, same_cost)), abs=1e-9)


def test_fractions_that_meet_the_budget_in_whole_widths_are_taken_as_they_are() -> None:
    space = MaskSpace((Family("attention", (4, 4), (50, 70)), Family("ffn", (30, 10), (3, 7))))
    widths = torch.tensor([1, 3, 21, 6])
    budget = Budget((Constraint("all", 0, space.n, int((widths * space.pair_costs).sum()), int(space.costs.sum())),))
    assert torch.equal(widths_within(widths / space.pair_counts, space, budget), widths)


def test_what_rounding_frees_goes_to_the_layers_that_lack_most() -> None:
    space = MaskSpace((Family("ffn", (10, 10, 10), (1, 1, 1)),))
    budget = Budget((Constraint("ffn", 0, 30, 15, 30),))
    assert widths_within(torch.tensor([0.22, 0.44, 0.84]), space, budget).tolist() == [2, 5, 8]
    shifted = widths_within(torch.tensor([0.42, 0.64, 1.04]), space, budget)  # the same, 0.2 higher
    assert shifted.tolist() == [2, 5, 8]


def test_a_dear_layer_that_cannot_pay_leaves_the_rest_to_cheap_ones() -> None:
    space = MaskSpace((Family("attention", (2,), (100,)), Family("ffn", (50,), (1,))))
    budget = Budget((Constraint("all", 0, 52, 130, 250),))
    assert widths_within(torch.tensor([0.45, 0.5]), space, budget).tolist() == [1, 30]
    assert widths_within(torch.tensor([0.95, 0.0]), space, budget).tolist() == [1, 30]


def test_the_size_of_a_large_model_is_rounded_to_widths_of_128() -> None:
    layers = 80
    space = MaskSpace(
        (
            Family("attention", (8,) * layers, (37_748_736,) * layers),
            Family("ffn", (28_672,) * layers, (24_576,) * layers),
        )
    )
    budget = budget_of(space, 0.3, "global", 0.2, {"ffn": 128})
    fractions = torch.rand(2 * layers, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    widths = widths_within(fractions, space, budget)
    assert (widths[layers:] % 128 == 0).all()
    assert (widths >= budget.limits(space)[0]).all()
    assert 0 <= budget.constraints[0].kept - int((widths * space.pair_costs).sum()) < 128 * 24_576


def test_limits_above_the_budget_are_refused() -> None:
    space = MaskSpace((Family("ffn", (4, 4), (3, 3)),))
    with pytest.raises(ValueError, match="ffn: the least widths cost 6 more than the 12 kept"):
        widths_within(torch.ones(2), space, budget_of(space, 0.5, "per-family", keep_at_least=0.6))
