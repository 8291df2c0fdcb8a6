"""The projection against its optimality conditions and slow references; hard masks against what they promise."""

from itertools import product

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pgprune_cli.core.projection import bundled_mask, hard_mask, project
from pgprune_cli.core.space import Budget, Constraint, Family, MaskSpace, budget_of


def one_family(costs: list[int], kept: int) -> tuple[MaskSpace, Budget]:
    """A space of one layer a unit, so that every unit has a cost of its own, and one budget over it."""
    space = MaskSpace((Family("ffn", (1,) * len(costs), tuple(costs)),))
    return space, Budget((Constraint("ffn", 0, len(costs), kept, sum(costs)),))


def by_bisection(theta: Tensor, cost: Tensor, kept: int) -> Tensor:
    """The ν at which Σ cost · clip(θ − ν) = kept, halving an interval that must hold it."""
    low, high = float(theta.min()) - 1.0, float(theta.max())
    for _ in range(200):
        middle = (low + high) / 2
        above = float((cost * (theta - middle).clamp(0.0, 1.0)).sum()) > kept
        low, high = (middle, high) if above else (low, middle)
    return (theta - (low + high) / 2).clamp(0.0, 1.0)


def by_active_sets(theta: Tensor, cost: Tensor, kept: int) -> Tensor:
    """argmin Σ cost · (x − θ)² over the feasible set: the best of every way to nail units to 0, to 1 or to neither."""
    best, best_distance = None, float("inf")
    for nailed in product((0.0, 1.0, None), repeat=len(theta)):
        free = torch.tensor([value is None for value in nailed])
        x = torch.tensor([0.0 if value is None else value for value in nailed], dtype=torch.float64)
        left = kept - float((cost * x).sum())
        if free.any():
            x[free] = theta[free] - ((cost * theta)[free].sum() - left) / cost[free].sum()
        elif abs(left) > 1e-9:
            continue
        if (x < -1e-9).any() or (x > 1 + 1e-9).any():
            continue
        distance = float((cost * (x - theta).square()).sum())
        if distance < best_distance:
            best, best_distance = x, distance
    assert best is not None
    return best


# Values on a coarse grid as well as any others: ties, and θ that touch 0 and 1, are the hard cases.
VALUES = st.one_of(st.integers(-8, 12).map(lambda k: k / 4), st.floats(-3, 3))


@st.composite
def problems(draw: st.DrawFn, most: int = 40) -> tuple[list[float], list[int], int]:
    """θ, costs and a budget for at most `most` units."""
    n = draw(st.integers(1, most))
    theta = draw(st.lists(VALUES, min_size=n, max_size=n))
    equal = draw(st.booleans())
    cost = draw(st.integers(1, 1000))
    costs = [cost] * n if equal else draw(st.lists(st.integers(1, 1000), min_size=n, max_size=n))
    return theta, costs, draw(st.integers(0, sum(costs)))


@given(problems())
@example(([0.0, 0.0], [1, 1], 1))
@example(([1.0, 0.0], [1, 1], 1))
@example(([5.0, -5.0, 0.5], [3, 1, 2], 3))
@settings(deadline=None, max_examples=300)
def test_a_projection_satisfies_its_optimality_conditions(problem: tuple[list[float], list[int], int]) -> None:
    """Feasible, and x = clip(θ − ν, 0, 1) for one ν: these are the KKT conditions, and the problem is convex."""
    theta, costs, kept = torch.tensor(problem[0], dtype=torch.float64), problem[1], problem[2]
    space, budget = one_family(costs, kept)
    x = project(theta, space, budget)
    assert x.dtype == torch.float64
    assert ((x >= 0) & (x <= 1)).all()
    assert float((space.costs * x).sum()) == pytest.approx(kept, abs=1e-9 * sum(costs))
    # ν is at most θ − 1 where x = 1, at least θ where x = 0, and θ − x in between.
    upper = [float(t - v) for t, v in zip(theta, x, strict=True) if v > 0]
    lower = [float(t - v) for t, v in zip(theta, x, strict=True) if v < 1]
    assert max(lower, default=-9e9) <= min(upper, default=9e9) + 1e-9


@given(problems())
@settings(deadline=None)
def test_a_projection_agrees_with_bisection(problem: tuple[list[float], list[int], int]) -> None:
    theta, costs, kept = torch.tensor(problem[0], dtype=torch.float64), problem[1], problem[2]
    space, budget = one_family(costs, kept)
    torch.testing.assert_close(project(theta, space, budget), by_bisection(theta, space.costs, kept))


@given(problems(most=4))
@settings(deadline=None, max_examples=50)
def test_a_projection_agrees_with_trying_all_active_sets(problem: tuple[list[float], list[int], int]) -> None:
    theta, costs, kept = torch.tensor(problem[0], dtype=torch.float64), problem[1], problem[2]
    space, budget = one_family(costs, kept)
    expected = by_active_sets(theta, space.costs.double(), kept)
    torch.testing.assert_close(project(theta, space, budget), expected, atol=1e-7, rtol=0.0)


def test_unequal_costs_move_every_unit_by_the_same_amount() -> None:
    space, budget = one_family([1, 10, 100], kept=40)
    moved = project(torch.tensor([0.5, 0.6, 0.7], dtype=torch.float64), space, budget)
    torch.testing.assert_close(
        torch.tensor([0.5, 0.6, 0.7], dtype=torch.float64) - moved,
        torch.full_like(moved, 0.3) + (76.5 - 40 - 0.3 * 111) / 111,
    )


@given(problems())
@settings(deadline=None)
def test_projecting_again_changes_nothing(problem: tuple[list[float], list[int], int]) -> None:
    space, budget = one_family(problem[1], problem[2])
    once = project(torch.tensor(problem[0], dtype=torch.float64), space, budget)
    torch.testing.assert_close(project(once, space, budget), once, atol=1e-12, rtol=0.0)


def test_a_budget_of_nothing_and_of_everything_leaves_no_choice() -> None:
    theta = torch.tensor([0.2, 7.0, -7.0])
    assert project(theta, *one_family([2, 3, 4], kept=0)).tolist() == [0.0, 0.0, 0.0]
    assert project(theta, *one_family([2, 3, 4], kept=9)).tolist() == [1.0, 1.0, 1.0]


def test_every_constraint_is_met_by_its_own_units() -> None:
    space = MaskSpace((Family("attention", (3, 3), (40, 50)), Family("ffn", (5, 5), (3, 7))))
    theta = torch.linspace(-1, 2, space.n, dtype=torch.float64)
    x = project(theta, space, budget_of(space, 0.25, "per-family"))
    spent = space.costs * x
    assert float(spent[:6].sum()) == pytest.approx(round(0.75 * 270))
    assert float(spent[6:].sum()) == pytest.approx(round(0.75 * 50))
    one = project(theta, space, budget_of(space, 0.25, "global"))
    assert float((space.costs * one).sum()) == pytest.approx(240)
    assert not torch.allclose(x, one)


@pytest.mark.parametrize("costs", [(12_288, 12_288), (4_718_592, 12_288)])
def test_many_units_meet_a_budget_of_billions(costs: tuple[int, int]) -> None:
    space = MaskSpace((Family("ffn", (25_000, 25_000), costs),))
    budget = budget_of(space, 0.3, "global")
    theta = torch.randn(space.n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = project(theta, space, budget)
    (constraint,) = budget
    assert float((space.costs * x).sum()) == pytest.approx(constraint.kept, rel=1e-12)
    torch.testing.assert_close(x, by_bisection(theta, space.costs, constraint.kept), atol=1e-9, rtol=0.0)


@pytest.mark.parametrize("scale", [1e3, 1e6, 1e9])
def test_a_theta_thrown_far_away_by_a_huge_gradient_still_meets_the_budget(scale: float) -> None:
    theta = scale * torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    space = MaskSpace((Family("ffn", (1000,), (7,)),))
    x = project(theta, space, budget_of(space, 0.5, "global"))
    assert float(x.sum()) == pytest.approx(500, abs=1e-3 * max(1.0, scale / 1e9))


# --- hard masks


@given(problems())
@settings(deadline=None, max_examples=200)
def test_a_hard_mask_fits_its_budget_and_nothing_left_out_would_still_fit(
    problem: tuple[list[float], list[int], int],
) -> None:
    theta, costs, kept = problem
    space, budget = one_family(costs, kept)
    mask = hard_mask(torch.tensor(theta, dtype=torch.float64), space, budget)
    room = kept - int(space.costs[mask].sum())
    assert room >= 0
    assert all(cost > room for cost, stays in zip(costs, mask.tolist(), strict=True) if not stays)
    if len(set(costs)) == 1:
        assert int(mask.sum()) == kept // costs[0]
        assert room < costs[0]


@given(problems())
@settings(deadline=None, max_examples=200)
def test_a_unit_is_left_out_only_for_units_that_matter_as_much(problem: tuple[list[float], list[int], int]) -> None:
    """Seen at its turn, a left-out unit had no room: the kept units of at least its θ leave less than it costs."""
    theta, costs, kept = problem
    space, budget = one_family(costs, kept)
    mask = hard_mask(torch.tensor(theta, dtype=torch.float64), space, budget).tolist()
    for out in (i for i, stays in enumerate(mask) if not stays):
        ahead = sum(costs[i] for i, stays in enumerate(mask) if stays and theta[i] >= theta[out])
        assert kept - ahead < costs[out]


def test_a_tie_at_the_threshold_does_not_keep_everything() -> None:
    """20 ones and 80 zeros at keep 0.7: `score >= threshold` keeps all 100."""
    space = MaskSpace((Family("ffn", (50, 50), (9, 9)),))
    theta = torch.zeros(100, dtype=torch.float64)
    theta[::5] = 1.0
    mask = hard_mask(theta, space, budget_of(space, 0.3, "per-family"))
    assert int(mask.sum()) == 70
    assert mask[::5].all()
    assert [int(part.sum()) for part in space.per_layer(mask, "ffn")] == [35, 35]


@pytest.mark.parametrize("counts", [(10, 10, 10, 10), (40, 20, 10, 30)])
@pytest.mark.parametrize("sparsity", [0.1, 0.33, 0.5, 0.9])
def test_ties_fall_evenly_over_the_layers(counts: tuple[int, ...], sparsity: float) -> None:
    space = MaskSpace((Family("ffn", counts, (3,) * 4),))
    mask = hard_mask(torch.full((space.n,), 0.5, dtype=torch.float64), space, budget_of(space, sparsity, "per-family"))
    for part, count in zip(space.per_layer(mask, "ffn"), counts, strict=True):
        assert abs(int(part.sum()) - (1 - sparsity) * count) <= 1.0


def test_a_dear_unit_that_does_not_fit_lets_cheaper_ones_pass() -> None:
    space, budget = one_family([10, 4, 4, 1], kept=9)
    mask = hard_mask(torch.tensor([0.9, 0.8, 0.7, 0.6], dtype=torch.float64), space, budget)
    assert mask.tolist() == [False, True, True, True]


def test_hard_masks_obey_every_constraint() -> None:
    space = MaskSpace((Family("attention", (4, 4), (50, 50)), Family("ffn", (30, 30), (3, 3))))
    theta = torch.rand(space.n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = hard_mask(theta, space, budget_of(space, 0.5, "per-family"))
    assert (int(mask[:8].sum()), int(mask[8:].sum())) == (4, 30)
    assert set(theta[:8].topk(4).indices.tolist()) == set(mask[:8].nonzero().flatten().tolist())
    nothing = hard_mask(theta, space, budget_of(space, 1.0, "global"))
    everything = hard_mask(theta, space, budget_of(space, 0.0, "global"))
    assert not nothing.any()
    assert everything.all()


# --- masks of whole bundles


@st.composite
def bundles(draw: st.DrawFn) -> tuple[MaskSpace, Budget, Tensor, dict[str, int]]:
    """Two families of unequal layers with costs of their own; values with ties as well as without."""
    layers = draw(st.integers(1, 4))
    families = []
    for name in ("attention", "ffn"):
        counts = draw(st.lists(st.integers(0, 9), min_size=layers, max_size=layers))
        costs = draw(st.lists(st.integers(1, 50), min_size=layers, max_size=layers))
        families.append(Family(name, tuple(counts), tuple(costs)))
    space = MaskSpace(tuple(families))
    values = st.one_of(VALUES, st.sampled_from([0.1, 0.3, 0.7]))  # 0.1 + 0.1 + 0.1 is not 3 · 0.1
    value = torch.tensor(draw(st.lists(values, min_size=space.n, max_size=space.n)), dtype=torch.float64)
    multiples = {name: draw(st.integers(1, 5)) for name in ("attention", "ffn")}
    scope = draw(st.sampled_from(["global", "per-family"]))
    return space, budget_of(space, draw(st.floats(0, 1)), scope), value, multiples


def tied(value: float, count: int, multiple: int) -> tuple[MaskSpace, Budget, Tensor, dict[str, int]]:
    space = MaskSpace((Family("ffn", (count,), (1,)),))
    budget = Budget((Constraint("ffn", 0, count, count - 1, count),))
    return space, budget, torch.full((count,), value, dtype=torch.float64), {"ffn": multiple}


@given(bundles())
@example(tied(-0.1, 4, 3))  # the mean of three is below the one that is left over
@settings(deadline=None, max_examples=100)
def test_a_layer_keeps_its_best_units_in_bundles_as_long_as_they_fit(
    problem: tuple[MaskSpace, Budget, Tensor, dict[str, int]],
) -> None:
    space, budget, value, multiples = problem
    mask = bundled_mask(value, space, budget, multiples)
    rooms = {c.name: c.kept - int(space.costs[c.units][mask[c.units]].sum()) for c in budget}
    assert min(rooms.values()) >= 0
    for family in space.families:
        room, multiple = rooms.get(family.name, rooms.get("all")), multiples[family.name]
        kept_of, value_of = space.per_layer(mask, family.name), space.per_layer(value, family.name)
        for count, cost, stays, values in zip(family.counts, family.costs, kept_of, value_of, strict=True):
            kept = int(stays.sum())
            assert kept % multiple == 0 or kept == count
            if 0 < kept < count:
                assert values[stays].min() >= values[~stays].max()
            if kept < count:  # room only shrinks, so what did not fit at its turn does not fit now
                assert cost * min(multiple, count - kept) > room


@given(problems())
@settings(deadline=None, max_examples=100)
def test_bundles_of_one_unit_of_equal_costs_are_the_hard_mask(problem: tuple[list[float], list[int], int]) -> None:
    """Up to ties, which both spread over the layers, but by the place in the layer or by the rank in it."""
    theta, costs, kept = torch.tensor(problem[0], dtype=torch.float64), problem[1], problem[2]
    half = len(theta) // 2
    space = MaskSpace((Family("ffn", (half, len(theta) - half), (costs[0],) * 2),))
    budget = Budget((Constraint("ffn", 0, len(theta), min(kept, costs[0] * len(theta)), costs[0] * len(theta)),))
    mask, hard = bundled_mask(theta, space, budget, {"ffn": 1}), hard_mask(theta, space, budget)
    assert theta[mask].sort().values.tolist() == theta[hard].sort().values.tolist()
    if len(theta.unique()) == len(theta):
        assert torch.equal(mask, hard)


@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_tied_bundles_fall_evenly_over_the_layers(multiple: int) -> None:
    space = MaskSpace((Family("ffn", (16, 16, 16), (3,) * 3),))
    value = torch.full((space.n,), 0.1, dtype=torch.float64)
    mask = bundled_mask(value, space, budget_of(space, 0.5, "global"), {"ffn": multiple})
    assert [int(part.sum()) for part in space.per_layer(mask, "ffn")] == [8, 8, 8]


def test_a_bundle_that_does_not_fit_ends_its_layer_and_no_other() -> None:
    space = MaskSpace((Family("attention", (2,), (10,)), Family("ffn", (6,), (1,))))
    budget = Budget((Constraint("all", 0, 8, 13, 26),))
    value = torch.tensor([0.9, 0.8, 0.7, 0.1, 0.6, 0.5, 0.4, 0.2], dtype=torch.float64)
    mask = bundled_mask(value, space, budget, {"attention": 1, "ffn": 2})
    assert mask.nonzero().flatten().tolist() == [0, 2, 4]
