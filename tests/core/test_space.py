"""The flat axis of units, its per-layer views, costs and budgets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgprune_cli.core.space import Budget, Family, MaskSpace, budget_of

ATTENTION = Family("attention", (2, 0, 3), (40, 40, 50))
FFN = Family("ffn", (4, 1, 2), (3, 5, 7))
SPACE = MaskSpace((ATTENTION, FFN))


def test_units_lie_family_after_family_and_layer_after_layer() -> None:
    assert (ATTENTION.size, FFN.size, SPACE.n) == (5, 7, 12)
    assert SPACE.slice_of("attention") == slice(0, 5)
    assert SPACE.slice_of("ffn") == slice(5, 12)
    flat = torch.arange(12)
    assert [part.tolist() for part in SPACE.per_layer(flat, "attention")] == [[0, 1], [], [2, 3, 4]]
    assert [part.tolist() for part in SPACE.per_layer(flat, "ffn")] == [[5, 6, 7, 8], [9], [10, 11]]


def test_per_layer_parts_are_views() -> None:
    flat = torch.zeros(12)
    SPACE.per_layer(flat, "ffn")[1].fill_(7.0)
    assert flat.nonzero().tolist() == [[9]]


def test_every_unit_has_the_cost_of_its_layer() -> None:
    assert SPACE.costs.tolist() == [40, 40, 50, 50, 50, 3, 3, 3, 3, 5, 7, 7]
    assert SPACE.costs.dtype == torch.int64
    assert ATTENTION.layer_costs(2).tolist() == [50, 50, 50] and ATTENTION.layer_costs(1).tolist() == []


def test_units_of_a_layer_can_have_costs_of_their_own() -> None:
    family = Family("attention", (3, 0, 2), ((9, 4, 5), (), 7))
    space = MaskSpace((family, FFN))
    assert space.costs.tolist() == [9, 4, 5, 7, 7, 3, 3, 3, 3, 5, 7, 7]
    assert [family.layer_costs(layer).tolist() for layer in range(3)] == [[9, 4, 5], [], [7, 7]]
    attention, _ = budget_of(space, 0.5, "per-family")
    assert (attention.kept, attention.total) == (16, 32)


def test_a_minimum_width_needs_the_first_units_of_its_layer() -> None:
    """Those of a chain are kept from the first on, and their costs differ."""
    space = MaskSpace((Family("attention", (4, 3), ((9, 4, 5, 1), (2, 8, 1))),))
    assert budget_of(space, 0.0, "global", min_keep=0.5).needed(space) == (9 + 4 + 2 + 8,)
    assert budget_of(space, 0.0, "global", 0.2, {"attention": 3}).needed(space) == (9 + 4 + 5 + 2 + 8 + 1,)


def test_evenness_is_the_place_within_the_layer() -> None:
    attention, ffn = SPACE.per_layer(SPACE.evenness, "attention"), SPACE.per_layer(SPACE.evenness, "ffn")
    assert attention[0].tolist() == [0.25, 0.75]
    assert ffn[0].tolist() == [0.125, 0.375, 0.625, 0.875]
    assert ffn[1].tolist() == [0.5]
    assert SPACE.evenness.dtype == torch.float64


def test_pairs_are_the_layers_of_every_family_in_the_order_of_the_flat_axis() -> None:
    assert SPACE.pair_counts.tolist() == [2, 0, 3, 4, 1, 2]
    assert SPACE.pair_starts.tolist() == [0, 2, 2, 5, 9, 10]
    assert SPACE.pair_of.tolist() == [0, 0, 2, 2, 2, 3, 3, 3, 3, 4, 5, 5]
    assert SPACE.family_of_pair.tolist() == [0, 0, 0, 1, 1, 1]
    assert MaskSpace((Family("layer", (1, 1), (9, 9)), FFN)).family_of_pair.tolist() == [0, 0, 1, 1, 1]


def test_a_budget_per_family_keeps_the_same_fraction_of_each() -> None:
    attention, ffn = budget_of(SPACE, 0.5, "per-family")
    assert (attention.name, attention.units, attention.kept, attention.total) == ("attention", slice(0, 5), 115, 230)
    assert (ffn.name, ffn.units, ffn.kept, ffn.total) == ("ffn", slice(5, 12), 16, 31)


def test_a_global_budget_is_one_constraint_over_everything() -> None:
    (everything,) = budget_of(SPACE, 0.3, "global")
    assert (everything.units, everything.kept, everything.total) == (slice(0, 12), 183, 261)


@given(
    counts=st.lists(st.integers(1, 2000), min_size=1, max_size=4),
    cost=st.integers(1, 10**6),
    removed=st.integers(0, 100),
    scope=st.sampled_from(["per-family", "global"]),
)
@settings(deadline=None)
def test_the_kept_cost_is_the_nearest_whole_number(counts: list[int], cost: int, removed: int, scope: str) -> None:
    """int(n · (1 − sparsity)) is one too few where the product falls just below a whole number."""
    space = MaskSpace((Family("ffn", tuple(counts), (cost,) * len(counts)),))
    (constraint,) = budget_of(space, removed / 100, scope)
    assert constraint.total == sum(counts) * cost
    assert abs(100 * constraint.kept - (100 - removed) * constraint.total) <= 50


def test_a_budget_of_everything_and_of_nothing() -> None:
    assert [c.kept for c in budget_of(SPACE, 0.0, "per-family")] == [230, 31]
    assert [c.kept for c in budget_of(SPACE, 1.0, "per-family")] == [0, 0]


# --- limits


def test_without_limits_nothing_has_to_stay_and_every_width_will_do() -> None:
    for budget in (budget_of(SPACE, 0.5, "global"), Budget(budget_of(SPACE, 0.5, "global").constraints)):
        least, multiples = budget.limits(SPACE)
        assert least.tolist() == [0] * 6
        assert multiples.tolist() == [1] * 6
        assert budget.needed(SPACE) == (0,)


def test_the_fraction_that_stays_at_least_is_rounded_up_to_whole_units() -> None:
    budget = budget_of(SPACE, 0.0, "per-family", min_keep=0.5)
    assert budget.limits(SPACE)[0].tolist() == [1, 0, 2, 2, 1, 1]
    assert budget.needed(SPACE) == (40 + 100, 6 + 5 + 7)
    assert budget_of(SPACE, 0.0, "global", min_keep=0.5).needed(SPACE) == (158,)


@given(st.integers(0, 100), st.integers(1, 12_000))
def test_a_fraction_that_is_a_whole_number_of_units_is_that_number(percent: int, count: int) -> None:
    """0.07 * 100 is 7.000000000000001 in floating point."""
    space = MaskSpace((Family("ffn", (count,), (1,)),))
    assert budget_of(space, 0.0, "global", percent / 100).min_widths == (-(-percent * count // 100),)


def test_the_least_width_is_one_that_the_multiple_allows() -> None:
    space = MaskSpace((Family("attention", (4,), (9,)), Family("ffn", (10, 12, 3), (1, 1, 1))))
    budget = budget_of(space, 0.0, "global", 0.45, {"ffn": 4})
    assert budget.min_widths == (2, 5, 6, 2)
    assert budget.multiples == (1, 4, 4, 4)
    assert budget.limits(space)[0].tolist() == [2, 8, 8, 3]  # of 3 channels, 0 or all can stay
    assert budget.needed(space) == (2 * 9 + 8 + 8 + 3,)
    assert budget_of(space, 0.0, "global", 0.9, {"ffn": 4}).limits(space)[0].tolist() == [4, 10, 12, 3]


def test_an_unknown_scope_is_refused() -> None:
    with pytest.raises(ValueError, match="scope 'layer'"):
        budget_of(SPACE, 0.5, "layer")


@pytest.mark.parametrize(
    ("counts", "costs", "message"),
    [
        ((1, 2), (3,), "family ffn: 2 layers of units, 1 of costs"),
        ((1, -1), (3, 3), "counts must not be negative"),
        ((1, 2), (3, 0), "costs must be positive"),
        ((1, 2), (-3, 3), "costs must be positive"),
        ((1, 2), (3, (3, 0)), "costs must be positive"),
        ((1, 2), (3, (3,)), "family ffn: 2 units in a layer, 1 costs"),
    ],
)
def test_an_impossible_family_is_refused(counts: tuple[int, ...], costs: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Family("ffn", counts, costs)


def test_a_layer_without_units_may_cost_nothing() -> None:
    assert MaskSpace((Family("ffn", (2, 0), (3, 0)),)).costs.tolist() == [3, 3]


def test_an_unknown_family_has_no_place() -> None:
    with pytest.raises(KeyError, match="layer"):
        SPACE.slice_of("layer")
