"""Grids: regular masks, what they cost, and the nested chain of their widths, against brute force."""

from __future__ import annotations

import itertools
from itertools import pairwise

import pytest
import torch
from helpers.grids import chain_length, is_regular
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pgprune_cli.core.grid import (
    Grid,
    GridCost,
    GridRemoval,
    chain_of_removal,
    chain_of_scores,
    element_order,
    first_elements,
    is_chain,
    one_unit_per_group,
    unit_costs,
)


@st.composite
def grids(draw: st.DrawFn, groups: int = 5, members: int = 5) -> Grid:
    count = draw(st.integers(1, groups))
    return Grid(count, draw(st.integers(1, members)), draw(st.integers(1, count)), draw(st.booleans()))


costs = st.builds(GridCost, st.integers(1, 50), st.integers(0, 50), st.integers(0, 20))


@st.composite
def scored(draw: st.DrawFn, groups: int = 5, members: int = 5) -> tuple[Grid, GridCost, Tensor]:
    """A grid, costs, and scores of its elements, among them ties and zeros."""
    grid = draw(grids(groups, members))
    values = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 100))
    scores = draw(st.lists(values, min_size=grid.elements, max_size=grid.elements))
    return grid, draw(costs), torch.tensor(scores, dtype=torch.float64)


def kept_at(partition: Tensor, width: int) -> Tensor:
    """Return the mask of the first units."""
    return partition < width


# --- grids and masks


def test_elements_lie_group_after_group() -> None:
    grid = Grid(3, 2)
    mask = torch.tensor([0, 1, 0, 0, 1, 1], dtype=torch.bool)
    assert grid.kept_groups(mask).tolist() == [True, False, True]
    assert not is_regular(grid, mask)
    mask[4] = False
    assert is_regular(grid, mask) and grid.kept(mask) == (2, 1)
    assert grid.kept(torch.zeros(6).bool()) == (0, 0)
    assert first_elements(grid, 2, 1).tolist() == [True, False, True, False, False, False]
    assert (grid.elements, first_elements(grid, 0, 0).any()) == (6, False)


@given(grids(), st.data())
def test_a_mask_is_regular_if_every_kept_group_keeps_the_same_number(grid: Grid, data: st.DataObject) -> None:
    drawn = data.draw(st.lists(st.booleans(), min_size=grid.elements, max_size=grid.elements))
    counts = {sum(drawn[group * grid.members :][: grid.members]) for group in range(grid.groups)} - {0}
    assert is_regular(grid, torch.tensor(drawn)) == (len(counts) <= 1)
    if len(counts) == 1:
        groups, members = grid.kept(torch.tensor(drawn))
        assert (members, groups * members) == (counts.pop(), sum(drawn))


@given(grids(), costs)
def test_costs_of_masks_are_those_of_their_sizes(grid: Grid, cost: GridCost) -> None:
    for groups, members in itertools.product(range(grid.groups + 1), range(grid.members + 1)):
        expected = cost.element * groups * members + cost.group * groups + cost.member * members
        expected = expected if groups and members else 0
        assert cost.of(groups, members) == cost.of_mask(grid, first_elements(grid, groups, members)) == expected
    assert cost.of_whole(grid) == cost.of_mask(grid, torch.ones(grid.elements).bool())


def test_only_grids_of_equal_elements_are_lines() -> None:
    assert Grid(1, 24, shared_rows=False).is_line  # channels
    assert Grid(4, 1).is_line  # KV heads with one query head each
    assert not Grid(1, 4).is_line  # the query heads of one KV head, which has rows of its own
    assert not Grid(4, 2).is_line and not Grid(8, 12, shared_rows=False).is_line
    assert one_unit_per_group(Grid(4, 2)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert one_unit_per_group(Grid(1, 3, shared_rows=False)).tolist() == [0, 1, 2]
    assert one_unit_per_group(Grid(3, 1)).tolist() == [0, 1, 2]
    assert one_unit_per_group(Grid(1, 3)).tolist() == [0, 0, 0]


# --- chains


@given(scored())
@settings(deadline=None, max_examples=200)
@example((Grid(1, 4), GridCost(3, 2), torch.arange(4.0)))  # MQA: one KV head
@example((Grid(4, 3, 4), GridCost(3, 0, 1), torch.arange(12.0)))  # a router that picks all experts
def test_every_width_of_a_chain_is_regular_nested_and_within_min_groups(
    problem: tuple[Grid, GridCost, Tensor],
) -> None:
    grid, cost, scores = problem
    for chain in (chain_of_scores(scores, grid, cost), chain_of_scores(torch.arange(grid.elements) + 1.0, grid, cost)):
        units = int(chain.max()) + 1
        assert chain.dtype == torch.int64 and set(chain.tolist()) == set(range(units))
        masks = [kept_at(chain, width) for width in range(units + 1)]
        assert not masks[0].any() and masks[-1].all()
        for narrow, wide in pairwise(masks):
            assert wide[narrow].all() and int(wide.sum()) > int(narrow.sum())
        for mask in masks[1:]:
            assert is_regular(grid, mask)
            assert grid.kept(mask)[0] >= grid.min_groups
        sizes = [grid.kept(mask) for mask in masks[1:]]
        for (groups, members), (more_groups, more_members) in pairwise(sizes):
            assert (more_groups - groups, more_members - members) in ((1, 0), (0, 1))


@given(scored())
@settings(deadline=None)
def test_a_chain_has_a_step_for_every_group_and_member_but_one(problem: tuple[Grid, GridCost, Tensor]) -> None:
    """From (groups, members) down to (min groups, 1), and one more step to nothing."""
    grid, cost, scores = problem
    units = int(chain_of_scores(scores, grid, cost).max()) + 1
    assert units == grid.groups - grid.min_groups + grid.members
    if not grid.is_line:
        assert units == chain_length(grid)
    else:
        assert chain_length(grid) == grid.elements == int(one_unit_per_group(grid).max()) + 1


@given(scored())
@settings(deadline=None)
def test_unit_costs_are_positive_and_add_up_to_every_width(problem: tuple[Grid, GridCost, Tensor]) -> None:
    grid, cost, scores = problem
    chain = chain_of_scores(scores, grid, cost)
    if not is_chain(chain, grid):
        return
    steps = unit_costs(chain, grid, cost)
    assert min(steps) > 0 and sum(steps) == cost.of_whole(grid)
    for width in range(len(steps) + 1):
        assert sum(steps[:width]) == cost.of_mask(grid, kept_at(chain, width))


@given(grids(), costs)
def test_whole_groups_and_single_elements_share_the_cost_equally(grid: Grid, cost: GridCost) -> None:
    assume(grid.shared_rows or not cost.group)  # a group without rows of its own costs nothing
    partition = one_unit_per_group(grid)
    assert not is_chain(partition, grid)
    shares = unit_costs(partition, grid, cost)
    assert len(set(shares)) == 1
    assert 0 <= cost.of_whole(grid) - sum(shares) < len(shares)
    if not cost.member:  # nothing is shared by all groups
        assert sum(shares) == cost.of_whole(grid)


def greedy(grid: Grid, cost: GridCost, scores: Tensor) -> list[set[int]]:
    """Return the elements that each step removes, first to last: of all possible steps, the least score per cost."""
    remaining, steps = {(g, m) for g in range(grid.groups) for m in range(grid.members)}, []
    value = {(g, m): float(scores[g * grid.members + m]) for g, m in remaining}
    while remaining:
        groups = sorted({g for g, _ in remaining})
        members = len(remaining) // len(groups)
        now = cost.of(len(groups), members)
        candidates = []
        if len(groups) > grid.min_groups:
            saved = max(now - cost.of(len(groups) - 1, members), 1)
            for group in groups:
                whole = {element for element in remaining if element[0] == group}
                candidates.append((sum(value[element] for element in sorted(whole)) / saved, whole))
        if members > 1 or len(groups) == grid.min_groups:
            least = {min((e for e in remaining if e[0] == g), key=lambda e: (value[e], e)) for g in groups}
            saved = max(now - cost.of(len(groups), members - 1), 1)
            candidates.append((sum(value[element] for element in sorted(least)) / saved, least))
        _, removed = min(candidates, key=lambda candidate: candidate[0])
        steps.append({g * grid.members + m for g, m in removed})
        remaining -= removed
    return steps


@given(
    grids(4, 4),
    costs,
    st.lists(st.integers(0, 10**6), min_size=16, max_size=16),
)
@settings(deadline=None, max_examples=200)
def test_a_chain_of_scores_is_the_greedy_one(grid: Grid, cost: GridCost, whole: list[int]) -> None:
    """Whole numbers as scores, so that sums are exact in any order."""
    scores = torch.tensor(whole[: grid.elements], dtype=torch.float64)
    steps = greedy(grid, cost, scores)
    chain = chain_of_scores(scores, grid, cost)
    assert [set((chain == len(steps) - 1 - step).nonzero().flatten().tolist()) for step in range(len(steps))] == steps


@given(st.integers(1, 12), costs, st.booleans(), st.data())
@settings(deadline=None)
def test_a_line_removes_single_elements_by_rising_score(
    count: int, cost: GridCost, channels: bool, data: st.DataObject
) -> None:
    grid = Grid(1, count, shared_rows=False) if channels else Grid(count, 1)
    scores = torch.tensor(data.draw(st.permutations(range(count))), dtype=torch.float64)
    assert grid.is_line
    units = grid.elements - 1 - scores.argsort().argsort()
    assert torch.equal(chain_of_scores(scores, grid, cost), units)


@given(st.permutations(range(9)), st.floats(0.1, 10))
def test_a_chain_of_removal_numbers_the_steps_from_the_last(order: list[int], scale: float) -> None:
    """Only the order of the values counts, and equal values are one step."""
    steps = torch.tensor(order) // 2  # 0 to 4
    chain = chain_of_removal(steps.double() * scale)
    assert torch.equal(chain, 4 - steps)


# --- removal down to a target


@given(grids(), costs, st.data())
@settings(deadline=None, max_examples=200)
def test_a_target_is_hit_exactly(grid: Grid, cost: GridCost, data: st.DataObject) -> None:
    target = (data.draw(st.integers(grid.min_groups, grid.groups)), data.draw(st.integers(1, grid.members)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    scores = torch.rand(grid.elements, generator=generator, dtype=torch.float64)
    removal = GridRemoval(grid, cost, target)

    def slot() -> tuple[float, Tensor]:
        members = removal.remaining[removal.groups].long().argmax(1)
        elements = removal.groups * grid.members + members
        return float(scores[elements].sum()), elements

    for _ in range(chain_length(grid) + grid.elements):
        if removal.is_finished:
            break
        _, elements = removal.cheapest(
            lambda: torch.stack([scores[removal.elements_of(group)].sum() for group in removal.groups.tolist()]), slot
        )
        removal.remove(elements)
        assert is_regular(grid, removal.remaining.flatten())
    assert removal.is_finished
    assert grid.kept(removal.remaining.flatten()) == target


@pytest.mark.parametrize("grid", [Grid(4, 2), Grid(1, 4), Grid(8, 12, 2, shared_rows=False)])
def test_without_a_target_a_removal_ends_with_nothing(grid: Grid) -> None:
    removal = GridRemoval(grid, GridCost(1))
    steps = 0
    while not removal.is_finished:
        _, elements = removal.cheapest(
            lambda: torch.ones(len(removal.groups)),
            lambda: (1.0, removal.groups * grid.members + removal.remaining[removal.groups].long().argmax(1)),
        )
        removal.remove(elements)
        steps += 1
    assert not removal.remaining.any()
    assert steps == chain_length(grid)


@given(scored())
@settings(deadline=None)
def test_every_width_of_a_chain_is_a_prefix_in_the_order_of_its_elements(
    problem: tuple[Grid, GridCost, Tensor],
) -> None:
    grid, cost, scores = problem
    partition = chain_of_scores(scores, grid, cost)
    units = torch.arange(int(partition.max()) + 1)
    elements = element_order(partition, units, grid)
    groups = elements.view(grid.groups, grid.members) // grid.members
    assert sorted(elements.tolist()) == list(range(grid.elements)) and (groups == groups[:, :1]).all()
    for width in range(len(units) + 1):
        mask = kept_at(partition, width)
        assert torch.equal(mask[elements], first_elements(grid, *grid.kept(mask)))
