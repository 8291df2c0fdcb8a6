"""The projection against its optimality conditions and slow references; hard masks against what they promise."""

from dataclasses import replace
from itertools import accumulate, pairwise, product

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pgprune_cli.core.projection import coarser, hard_mask, project, project_onto
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


@given(problems(), st.lists(st.integers(0, 8), min_size=40, max_size=40))
@settings(deadline=None, max_examples=200)
def test_a_projection_above_lower_bounds_satisfies_its_optimality_conditions(
    problem: tuple[list[float], list[int], int], eighths: list[int]
) -> None:
    expected, weight = torch.tensor(problem[0], dtype=torch.float64), torch.tensor(problem[1], dtype=torch.float64)
    low = torch.tensor(eighths[: len(expected)], dtype=torch.float64) / 8
    x = project_onto(expected, weight, problem[2], low)
    assert ((x >= low) & (x <= 1)).all()
    reachable = max(problem[2], float((weight * low).sum()))
    assert float((weight * x).sum()) == pytest.approx(reachable, abs=1e-9 * float(weight.sum()))
    # ν is at most wanted − 1 where x = 1, at least wanted − low where x = low, and wanted − x in between.
    triples = list(zip(expected.tolist(), x.tolist(), low.tolist(), strict=True))
    upper = [t - v for t, v, bound in triples if v > bound]
    lower = [t - v for t, v, bound in triples if v < 1]
    assert max(lower, default=-9e9) <= min(upper, default=9e9) + 1e-9


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


# --- limits on widths


def one_unit_at_a_time(theta: Tensor, space: MaskSpace, budget: Budget) -> Tensor:
    """The rule without limits, as a loop: by falling θ, then by place within the layer, whatever still fits.

    After a unit that does not fit, nothing more of its layer is kept, even if it costs less.
    """
    mask, refused = torch.zeros(space.n, dtype=torch.bool), set()
    ranked = sorted(range(space.n), key=lambda i: (-float(theta[i]), float(space.evenness[i]), i))
    for constraint in budget:
        room = constraint.kept
        for i in ranked:
            pair = int(space.pair_of[i])
            if not constraint.start <= i < constraint.stop or pair in refused:
                continue
            if int(space.costs[i]) <= room:
                mask[i] = True
                room -= int(space.costs[i])
            else:
                refused.add(pair)
    return mask


@st.composite
def spaces(draw: st.DrawFn, layers: int = 4, units: int = 9) -> tuple[MaskSpace, Tensor]:
    """Two families of a few layers, some of them empty, with a θ full of ties.

    Where the units of a layer have costs of their own, as the steps of a chain do, θ falls along the layer.
    """
    families = []
    for name in ("attention", "ffn"):
        size = draw(st.integers(1, layers))
        counts = draw(st.lists(st.integers(0, units), min_size=size, max_size=size))
        match draw(st.sampled_from(["equal", "by layer", "by unit"])):
            case "equal":
                costs = [draw(st.integers(1, 60))] * size
            case "by layer":
                costs = draw(st.lists(st.integers(1, 60), min_size=size, max_size=size))
            case _:
                costs = [tuple(draw(st.lists(st.integers(1, 60), min_size=n, max_size=n))) for n in counts]
        families.append(Family(name, tuple(counts), tuple(costs)))
    space = MaskSpace(tuple(families))
    values = st.one_of(st.sampled_from([0.1, 0.3, 0.7]), st.floats(0, 1))
    theta = torch.tensor(draw(st.lists(values, min_size=space.n, max_size=space.n)), dtype=torch.float64)
    for family in families:
        for costs, part in zip(family.costs, space.per_layer(theta, family.name), strict=True):
            if isinstance(costs, tuple):
                part.copy_(part.sort(descending=True).values)
    return space, theta


FRACTIONS = st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.9])


@st.composite
def limited(draw: st.DrawFn, layers: int = 4, units: int = 9) -> tuple[MaskSpace, Tensor, Budget]:
    """A space, a θ and a budget whose least widths fit."""
    space, theta = draw(spaces(layers, units))
    multiples = {"attention": draw(st.integers(1, 3)), "ffn": draw(st.integers(1, 6))}
    scope = draw(st.sampled_from(["per-family", "global", "per-layer"]))
    budget = budget_of(space, draw(FRACTIONS), scope, draw(FRACTIONS), multiples)
    if any(need > c.kept for need, c in zip(budget.needed(space), budget, strict=True)):
        budget = replace(budget, min_widths=())
    return space, theta, budget


def allowed_widths(space: MaskSpace, budget: Budget) -> list[list[int]]:
    """Every width that each (family, layer) may have."""
    least = budget.min_widths or (0,) * len(space.pair_counts)
    return [
        [width for width in range(count + 1) if width >= low and (width % multiple == 0 or width == count)]
        for count, low, multiple in zip(space.pair_counts.tolist(), least, budget.multiples, strict=True)
    ]


@given(spaces(), FRACTIONS, st.sampled_from(["per-family", "global", "per-layer"]))
@settings(deadline=None, max_examples=300)
def test_without_limits_units_stay_one_by_one(problem: tuple[MaskSpace, Tensor], sparsity: float, scope: str) -> None:
    space, theta = problem
    budget = budget_of(space, sparsity, scope)
    expected = one_unit_at_a_time(theta, space, budget)
    assert torch.equal(hard_mask(theta, space, budget), expected)
    assert torch.equal(hard_mask(theta, space, Budget(budget.constraints)), expected)


def kept_bundle_by_bundle(theta: Tensor, space: MaskSpace, budget: Budget) -> Tensor:
    """The rule with limits, as a loop over the layers' next bundles, the best that fits first."""
    mask = torch.zeros(space.n, dtype=torch.bool)
    waiting: dict[int, list[list[int]]] = {}
    for pair, widths in enumerate(allowed_widths(space, replace(budget, min_widths=()))):
        start, least = int(space.pair_starts[pair]), budget.min_widths[pair] if budget.min_widths else 0
        ranked = sorted(range(start, start + int(space.pair_counts[pair])), key=lambda i: (-float(theta[i]), i))
        pieces = [ranked[a:b] for a, b in pairwise(widths)]
        ends = list(accumulate(len(piece) for piece in pieces))
        forced = sum(end - len(piece) < least for end, piece in zip(ends, pieces, strict=True))
        mask[[i for piece in pieces[:forced] for i in piece]] = True
        waiting[pair] = pieces[forced:]
    for constraint in budget:
        mine = [p for p in waiting if waiting[p] and constraint.start <= waiting[p][0][0] < constraint.stop]
        room = constraint.kept - int(space.costs[constraint.units][mask[constraint.units]].sum())
        while mine := [p for p in mine if waiting[p]]:
            best = min(mine, key=lambda p: (-mean(theta, waiting[p][0]), mean(space.evenness, waiting[p][0]), p))
            bundle = waiting[best].pop(0)
            cost = int(space.costs[bundle].sum())
            if cost > room:
                waiting[best] = []
            else:
                mask[bundle] = True
                room -= cost
    return mask


def mean(values: Tensor, units: list[int]) -> float:
    """Exact where all are equal."""
    values_of_pair = values[units]
    return float(
        (sum((values[i] for i in units), start=torch.zeros((), dtype=torch.float64)) / len(units)).clamp(
            values_of_pair.min(), values_of_pair.max()
        )
    )


@given(limited())
@settings(deadline=None, max_examples=300)
def test_bundles_stay_one_by_one(problem: tuple[MaskSpace, Tensor, Budget]) -> None:
    space, theta, budget = problem
    assert torch.equal(hard_mask(theta, space, budget), kept_bundle_by_bundle(theta, space, budget))


@given(limited())
@settings(deadline=None, max_examples=300)
def test_a_limited_mask_keeps_to_its_limits_and_leaves_nothing_out_that_fits(
    problem: tuple[MaskSpace, Tensor, Budget],
) -> None:
    space, theta, budget = problem
    mask = hard_mask(theta, space, budget)
    widths = torch.zeros_like(space.pair_counts).index_add_(0, space.pair_of, mask.long())
    for constraint in budget:
        room = constraint.kept - int(space.costs[constraint.units][mask[constraint.units]].sum())
        assert room >= 0
        for pair, may in enumerate(allowed_widths(space, budget)):
            start, count = int(space.pair_starts[pair]), int(space.pair_counts[pair])
            if count and constraint.start <= start < constraint.stop:
                width = int(widths[pair])
                assert width in may
                ranked = sorted(range(start, start + count), key=lambda i: (-float(theta[i]), i))
                assert all(int(space.costs[ranked[width:wider]].sum()) > room for wider in may if wider > width)
                # the units of highest θ: none left out is above one that stays
                inside, values = mask[start : start + count], theta[start : start + count]
                assert inside.all() or not inside.any() or values[inside].min() >= values[~inside].max()


@pytest.mark.parametrize("counts", [(12, 12, 12, 12), (40, 20, 12, 30)])
@pytest.mark.parametrize("sparsity", [0.1, 0.33, 0.5, 0.9])
def test_tied_bundles_fall_evenly_over_the_layers(counts: tuple[int, ...], sparsity: float) -> None:
    space = MaskSpace((Family("ffn", counts, (3,) * 4),))
    budget = budget_of(space, sparsity, "per-family", multiples={"ffn": 4})
    mask = hard_mask(torch.full((space.n,), 0.1, dtype=torch.float64), space, budget)
    for part, count in zip(space.per_layer(mask, "ffn"), counts, strict=True):
        assert abs(int(part.sum()) - (1 - sparsity) * count) <= 4.0


def test_bundles_by_hand() -> None:
    """Ten channels in bundles of 4, 4 and 2: the last goes with the second, however cheap it is."""
    space = MaskSpace((Family("ffn", (10, 4), (1, 1)),))
    theta = torch.cat([torch.linspace(1.0, 0.55, 10), torch.full((4,), 0.3)]).double()

    def widths(kept: int, least: tuple[int, ...] = ()) -> list[int]:
        budget = Budget((Constraint("ffn", 0, 14, kept, 14),), least, (4, 4))
        return [int(part.sum()) for part in space.per_layer(hard_mask(theta, space, budget), "ffn")]

    assert [widths(kept) for kept in (3, 4, 7, 8, 9, 10, 13, 14)] == [
        [0, 0], [4, 0], [4, 0], [8, 0], [8, 0], [10, 0], [10, 0], [10, 4],
    ]  # fmt: skip
    assert widths(10, (0, 1)) == [4, 4]
    assert widths(12, (9, 0)) == [10, 0]


def test_a_multiple_may_be_given_for_one_mask_alone() -> None:
    space = MaskSpace((Family("attention", (4, 4), (5, 5)), Family("ffn", (10, 6), (1, 1))))
    theta = torch.rand(space.n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = budget_of(space, 0.4, "global", 0.25, {"attention": 2, "ffn": 3})
    bare = budget_of(space, 0.4, "global", 0.25)
    assert torch.equal(
        hard_mask(theta, space, coarser(bare, space, torch.tensor([2, 2, 3, 3]))), hard_mask(theta, space, own)
    )


def test_on_a_coarser_grid_least_widths_are_rounded_down_to_it() -> None:
    """Up, 6 of 10 would become 8, which the budget of 6 does not pay for."""
    space = MaskSpace((Family("ffn", (10, 10), (1, 1)),))
    theta = torch.linspace(0, 1, 20, dtype=torch.float64)
    budget = budget_of(space, 0.4, "per-layer", 0.6)
    assert [int(part.sum()) for part in space.per_layer(hard_mask(theta, space, budget), "ffn")] == [6, 6]
    coarse = hard_mask(theta, space, coarser(budget, space, torch.tensor([4, 4])))
    assert [int(part.sum()) for part in space.per_layer(coarse, "ffn")] == [4, 4]


def test_on_a_coarser_grid_layers_that_are_kept_whole_stay_whole() -> None:
    space = MaskSpace((Family("ffn", (10, 10, 10), (1, 1, 1)),))
    budget = budget_of(space, 0.4, "global", whole_layers=[1])
    coarse = hard_mask(
        torch.linspace(1, 0, 30, dtype=torch.float64), space, coarser(budget, space, torch.tensor([4] * 3))
    )
    assert [int(part.sum()) for part in space.per_layer(coarse, "ffn")] == [8, 10, 0]


@given(st.integers(0, 2), st.sampled_from([0.1, 0.3, 0.6]))
@settings(deadline=None, max_examples=20)
def test_theta_is_1_in_layers_that_are_kept_whole_and_the_others_pay(whole: int, sparsity: float) -> None:
    space = MaskSpace((Family("attention", (3, 3, 3), (7, 7, 7)), Family("ffn", (8, 8, 8), (2, 2, 2))))
    theta = torch.rand(space.n, generator=torch.Generator().manual_seed(whole), dtype=torch.float64)
    budget = budget_of(space, sparsity, "global", whole_layers=[whole])
    projected = project(theta, space, budget)
    for name in ("attention", "ffn"):
        assert (space.per_layer(projected, name)[whole] == 1.0).all()
    assert float(projected @ space.costs.double()) == pytest.approx(next(iter(budget)).kept)
    mask = hard_mask(projected, space, budget)
    widths = space.widths(mask)
    assert (widths["attention"][whole], widths["ffn"][whole]) == (3, 8)
    assert 0 <= next(iter(budget)).kept - int(space.costs[mask].sum()) < 7


def test_limits_above_the_budget_are_refused() -> None:
    space = MaskSpace((Family("ffn", (4, 4), (3, 3)),))
    budget = budget_of(space, 0.5, "per-family", min_keep=0.6)
    with pytest.raises(ValueError, match="ffn: the minimum widths cost 6 more than the 12 kept"):
        hard_mask(torch.zeros(8, dtype=torch.float64), space, budget)
