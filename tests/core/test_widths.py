"""The policy over layers: its samples, what ranks are worth, and that it goes downhill."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pgprune_cli.core.space import Family, MaskSpace
from pgprune_cli.core.widths import (
    FAMILY_SPREAD,
    FEW,
    LAYER_SPREAD,
    UNIT_SPREAD,
    WidthState,
    begin,
    priorities,
    propose,
    update,
    utilities,
)

SPACE = MaskSpace((Family("attention", (3, 3), (8, 8)), Family("ffn", (FEW + 1, 5), (3, 3))))
D = (1 + 2 + 6) + (1 + 2)
"""One coordinate for each family and each of its layers, and for each of the few attention units."""


def same(one: WidthState, other: WidthState) -> bool:
    return all(torch.equal(getattr(one, key), getattr(other, key)) for key in ("mean", "spread", "average"))


def test_a_search_begins_without_offsets_at_the_starting_spreads() -> None:
    state = begin(SPACE, 0)
    assert state.mean.tolist() == state.average.tolist() == [0.0] * D
    assert state.spread.tolist() == [
        *[FAMILY_SPREAD, LAYER_SPREAD, LAYER_SPREAD, *[UNIT_SPREAD] * 6],
        *[FAMILY_SPREAD, LAYER_SPREAD, LAYER_SPREAD],
    ]
    assert (state.step, state.skipped) == (0, 0)


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_deviates_come_in_mirrored_pairs(samples: int) -> None:
    state, deviates = propose(begin(SPACE, 0), samples)
    assert deviates.shape == (samples, D)
    pairs = samples // 2
    assert torch.equal(deviates[: 2 * pairs : 2], -deviates[1 : 2 * pairs : 2])
    assert len({tuple(row.abs().tolist()) for row in deviates}) == (samples + 1) // 2
    assert not torch.equal(propose(state, samples)[1], deviates)
    assert torch.equal(propose(begin(SPACE, 0), samples)[1], deviates)
    assert not torch.equal(propose(begin(SPACE, 1), samples)[1], deviates)


def test_deviates_are_standard_normal() -> None:
    _, deviates = propose(begin(SPACE, 0), 4000)
    half = deviates[::2]
    assert half.mean(0).abs().max() < 5 / math.sqrt(2000)
    torch.testing.assert_close(half.T.cov(), torch.eye(D, dtype=torch.float64), atol=0.15, rtol=0.0)


def test_the_worth_of_ranks_follows_the_paper() -> None:
    """Wierstra et al. 2014, eq. 11, spelled out for five samples."""
    raw = [max(0.0, math.log(5 / 2 + 1) - math.log(rank)) for rank in (1, 2, 3, 4, 5)]
    by_rank = [value / sum(raw) - 1 / 5 for value in raw]
    got = utilities(torch.tensor([30.0, 10.0, 50.0, 20.0, 40.0]))
    assert got.tolist() == pytest.approx([by_rank[2], by_rank[0], by_rank[4], by_rank[1], by_rank[3]])


# Whole numbers, so that a shift or a scale keeps them apart.
LOSSES = st.lists(st.integers(-1000, 1000), min_size=1, max_size=30, unique=True)


@given(LOSSES, st.integers(-1000, 1000), st.sampled_from([1e-3, 0.5, 7.0, 1e6]))
@settings(deadline=None)
def test_only_the_ranks_of_losses_count(losses: list[int], shift: int, scale: float) -> None:
    values = torch.tensor(losses, dtype=torch.float64)
    worth = utilities(values)
    assert float(worth.sum()) == pytest.approx(0.0, abs=1e-12)
    assert torch.equal(utilities(values + shift), worth)
    assert torch.equal(utilities(values * scale), worth)
    assert torch.equal(utilities(values**3), worth)
    assert (worth[values.argsort()].diff() <= 0).all()


def test_broken_losses_are_left_out_and_counted() -> None:
    state, deviates = propose(begin(SPACE, 0), 5)
    moved = update(state, deviates, torch.tensor([2.0, math.nan, 3.0, math.inf, -math.inf]))
    alone = update(state, deviates[[0, 2]], torch.tensor([2.0, 3.0]))
    assert same(moved, alone)
    assert not same(moved, state)
    assert (moved.step, moved.skipped, alone.skipped) == (1, 3, 0)
    assert state.mean.tolist() == [0.0] * D


@pytest.mark.parametrize(
    "losses", [[2.0] * 4, [math.nan] * 4, [math.inf, 1.0, math.nan, math.nan], [3.0, 3.0, math.inf]]
)
def test_losses_that_say_nothing_move_nothing(losses: list[float]) -> None:
    state, deviates = propose(begin(SPACE, 0), len(losses))
    moved = update(state, deviates, torch.tensor(losses))
    assert same(moved, state)
    assert (moved.step, moved.skipped) == (1, sum(not math.isfinite(loss) for loss in losses))


def test_the_mean_moves_towards_the_better_of_a_pair() -> None:
    state, deviates = propose(begin(SPACE, 0), 2)
    towards_first = update(state, deviates, torch.tensor([1.0, 2.0]))
    towards_second = update(state, deviates, torch.tensor([2.0, 1.0]))
    assert (towards_first.mean * deviates[0] > 0).all()
    torch.testing.assert_close(towards_second.mean, -towards_first.mean)
    assert torch.equal(towards_first.average, towards_first.mean)  # of one mean


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_average_of_the_means_settles_at_the_best_offsets(seed: int) -> None:
    """A quadratic in the offsets whose height changes with every batch: only comparisons within a batch can help."""
    best = torch.linspace(-1.5, 1.5, D, dtype=torch.float64)
    state = begin(SPACE, seed)
    for step in range(300):
        state, deviates = propose(state, 8)
        offsets = state.mean + state.spread * deviates
        state = update(state, deviates, (offsets - best).square().sum(-1) + 100 * math.sin(step))
    assert state.step == 300
    assert (state.average - best).norm() < 0.1 * best.norm()
    assert (state.spread < begin(SPACE, seed).spread).all()


def offsets_by_loops(offsets: Tensor, space: MaskSpace) -> list[float]:
    """What every unit's priority gets, coordinate by coordinate."""
    values, added = iter(offsets.tolist()), []
    for family in space.families:
        of_family = next(values)
        of_layers = [next(values) for _ in family.counts]
        few = max(family.counts) <= FEW
        for layer, count in zip(of_layers, family.counts, strict=True):
            added += [of_family + layer + (next(values) if few else 0.0) for _ in range(count)]
    assert next(values, None) is None
    return added


@pytest.mark.parametrize("seed", [0, 1])
def test_a_unit_gets_the_offsets_of_its_family_its_layer_and_where_few_its_own(seed: int) -> None:
    state, deviates = propose(begin(SPACE, seed), 4)
    state = update(state, deviates, torch.arange(4.0))
    state = update(state, deviates.flip(0), torch.arange(4.0))
    base = torch.randn(SPACE.n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sampled = priorities(base, state, deviates[0], SPACE)
    wanted = offsets_by_loops(state.mean + state.spread * deviates[0], SPACE)
    torch.testing.assert_close(sampled - base, torch.tensor(wanted, dtype=torch.float64))
    decided = priorities(base, state, None, SPACE)
    torch.testing.assert_close(decided - base, torch.tensor(offsets_by_loops(state.average, SPACE)).double())
    assert not torch.allclose(state.average, state.mean)


def test_only_families_of_few_units_a_layer_have_offsets_of_units() -> None:
    """One layer above the limit, and none of the family's units has one: they keep their order."""
    few = MaskSpace((Family("ffn", (FEW, 2), (1, 1)),))
    many = MaskSpace((Family("ffn", (FEW + 1, 2), (1, 1)),))
    assert len(begin(few, 0).mean) == 1 + 2 + FEW + 2
    assert len(begin(many, 0).mean) == 1 + 2
    _, (deviate,) = propose(begin(many, 0), 1)
    moved = priorities(torch.arange(many.n, dtype=torch.float64), begin(many, 0), deviate, many)
    for part in many.per_layer(moved, "ffn"):
        torch.testing.assert_close(part.diff(), torch.ones(len(part) - 1, dtype=torch.float64))
