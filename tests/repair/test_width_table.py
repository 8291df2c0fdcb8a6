"""What every width of a block costs, and what it is repaired to, against dropping units one by one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise, product
from typing import Any

import pytest
import torch
from helpers.blocks import (
    BLOCKS,
    batches,
    columns_in_order,
    columns_of,
    error_root_of,
    mask_of_first,
    model_unchanged,
    moments_by_hand,
    observed_inputs,
    output_linear,
    weighted_error,
)
from helpers.grids import is_regular
from helpers.masks import CHANNELS, LAYERS, dense_mask, keep_first
from helpers.models import tiny_model
from helpers.units import chain_units, ranks_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pgprune_cli.core.grid import element_order
from pgprune_cli.core.space import Family, MaskSpace
from pgprune_cli.forward.curvature import error_roots
from pgprune_cli.model.masks import LayerMask
from pgprune_cli.model.prunable import Partitions, PrunableModel
from pgprune_cli.repair.least_squares import repaired_output
from pgprune_cli.repair.width_table import (
    TIE,
    WIDTH_STEPS,
    WidthTable,
    _falling,
    solve_layers,
    table_bytes,
    width_step,
)

DAMPING = 1e-6


def units_of(model: nn.Module, families: Sequence[str] = ("attention", "ffn")) -> tuple[MaskSpace, Partitions]:
    """Return the steps of random chains."""
    return chain_units(PrunableModel.of(model).shape, families)


def width_table(
    model: nn.Module, damping: float, *, families: Sequence[str] = ("attention", "ffn"), **options: Any
) -> WidthTable:
    """Solve the table of random chains."""
    prunable = PrunableModel.of(model)
    _, units = units_of(model, families)
    ranks = ranks_of(prunable.shape, units)
    return WidthTable.of(prunable, dict(solve_layers(prunable, ranks, units, batches(), damping, **options)))


# --- the solved table


def test_a_step_between_levels_is_a_sixteenth_of_the_units_rounded_up() -> None:
    for count in (1, 4, 15, 16, 17, 24, 32, 33, 496, 1536):
        level = width_step(count)
        assert level * WIDTH_STEPS >= count > (level - 1) * WIDTH_STEPS
    assert (width_step(4), width_step(CHANNELS), width_step(0)) == (1, 2, 1)


@pytest.mark.parametrize(
    ("units", "multiple", "step"), [(1536, 1, 96), (11008, 1, 704), (4864, 1, 320), (11008, 48, 768), (600, 20, 40)]
)
def test_a_step_of_a_wide_block_is_a_multiple_of_what_kernels_multiply_at_a_time(
    units: int, multiple: int, step: int
) -> None:
    assert width_step(units, multiple) == step


def test_a_table_holds_what_every_width_would_be_repaired_to(architecture: str) -> None:
    """Every block at every level, as if it alone were cut."""
    model = tiny_model(architecture)
    with model_unchanged(model):
        table = width_table(model, 1e-3, solve=True)
    assert sorted(table.repaired) == sorted(table.orders) == sorted(table.errors) == sorted(BLOCKS)
    shape, (_, units) = PrunableModel.of(model).shape, units_of(model)
    ranks = ranks_of(shape, units)
    for key in BLOCKS:
        order, count, linear = table.orders[key], len(table.orders[key]), output_linear(model, *key)
        assert torch.equal(order, ranks[key].argsort(descending=True))
        moments = moments_by_hand(*observed_inputs(model, *key))
        widths = range(width_step(count), count, width_step(count))
        masks = [mask_of_first(order, kept, units[key]) for kept in widths]
        assert sorted(table.repaired[key]) == [int(mask.sum()) for mask in masks]
        for mask in masks:
            assert is_regular(shape.grids[key[1]][key[0]], mask)
            output = table.repaired[key][int(mask.sum())]
            elements = element_order(units[key], order, shape.grids[key[1]][key[0]])
            columns = columns_in_order(elements, mask, linear.in_features)
            expected = repaired_output(linear.weight, linear.bias, moments, columns, 1e-3, with_bias=False)
            torch.testing.assert_close(output.weight, expected.weight, rtol=1e-3, atol=1e-3)
            assert output.bias is linear.bias


@pytest.mark.parametrize("solve", [True, False])
def test_errors_are_what_the_text_loses_at_every_width(architecture: str, solve: bool) -> None:
    """By how much the loss feels each direction, and relative to each token's residual stream."""
    model = tiny_model(architecture)
    table = width_table(model, 1e-9, solve=solve)
    roots, (_, units) = error_roots(PrunableModel.of(model), batches()), units_of(model)
    assert solve or table.repaired == {}
    for key in [(0, "attention"), (2, "ffn"), (3, "attention"), (3, "ffn")]:
        errors, order, linear = table.errors[key], table.orders[key], output_linear(model, *key)
        assert errors.shape == (len(order) + 1,)
        assert errors.dtype == torch.float64
        assert abs(float(errors[-1])) < 1e-5 * float(errors[0])
        if solve:
            assert (errors.diff() <= 1e-9 * errors[0]).all()
        x, weights = observed_inputs(model, *key)
        moments, weight = moments_by_hand(x, weights), linear.weight.double()
        root = error_root_of(model, *key, roots[key[0]])
        level = width_step(len(order))
        for kept in range(0, len(order), level):
            columns = columns_of(mask_of_first(order, kept, units[key]), linear.in_features)
            kept_weight = weight[:, columns]
            if solve and kept:
                kept_weight = repaired_output(weight, None, moments, columns, 1e-9, with_bias=False).weight
            gone = x @ weight.T - x[:, columns] @ kept_weight.T
            if not kept and linear.bias is not None:  # it is removed with the last unit
                gone += linear.bias
            gone = gone @ root.T
            lost = weighted_error(gone, torch.zeros_like(gone), weights / len(x))
            assert float(errors[kept]) == pytest.approx(lost, rel=1e-2, abs=1e-4 * float(errors[0]))
        if level == 2:  # in between, a straight line
            torch.testing.assert_close(errors[1:-1:2], (errors[:-2:2] + errors[2::2]) / 2)


@pytest.mark.parametrize("families", [("ffn",), ("attention",), ("ffn", "attention")])
def test_only_blocks_with_units_are_solved(families: tuple[str, ...]) -> None:
    model = tiny_model("llama-gqa")
    whole = width_table(model, DAMPING, solve=True)
    table = width_table(model, DAMPING, families=families, solve=True)
    chosen = {key for key in BLOCKS if key[1] in families}
    assert set(table.repaired) == chosen == {key for key in table.errors if len(table.orders[key])}
    for key in chosen:
        torch.testing.assert_close(table.errors[key], whole.errors[key])


def test_whole_and_empty_blocks_have_no_outputs() -> None:
    model = tiny_model("qwen2")
    table, (_, units) = width_table(model, DAMPING, solve=True), units_of(model)
    every, nothing = dense_mask(model), keep_first(model, [(0, 0)] * LAYERS)
    assert table.repaired_for(every) == {}
    assert table.repaired_for(nothing) == {}
    attention, ffn = ((3, name) for name in ("attention", "ffn"))
    first_units = LayerMask(
        mask_of_first(table.orders[attention], 3, units[attention]), mask_of_first(table.orders[ffn], 10)
    )
    actual = table.repaired_for((*every[:2], nothing[2], first_units))
    assert actual.keys() == {attention, ffn}
    assert actual[attention] is table.repaired[attention][int(first_units.attention.sum())]
    assert actual[ffn] is table.repaired[ffn][10]


def test_table_bytes_are_those_of_the_projections_that_are_solved(architecture: str) -> None:
    model = tiny_model(architecture)
    table, (_, units) = width_table(model, DAMPING, solve=True), units_of(model)
    held = sum(output.weight.nbytes for by_width in table.repaired.values() for output in by_width.values())
    assert table_bytes(PrunableModel.of(model), units) == held


# --- priorities and errors of masks

SPACE = MaskSpace((Family("attention", (4, 3), (7, (9, 2, 5))), Family("ffn", (6, 0, 5), (2, 2, 3))))
"""Layers of different size, one of them empty. In one of them the units have costs of their own, as steps of chains."""


def costs_along(table: WidthTable, family: Family, index: int) -> list[int]:
    """Return the costs of a layer's units in the order in which they are kept."""
    return family.layer_costs(index)[table.orders[index, family.name]].tolist()


def random_table(seed: int) -> WidthTable:
    """Curves of any shape that end at 0, and orders."""
    generator = torch.Generator().manual_seed(seed)
    errors, orders = {}, {}
    for family in SPACE.families:
        for index, count in enumerate(family.counts):
            errors[index, family.name] = torch.rand(count + 1, generator=generator, dtype=torch.float64)
            errors[index, family.name][-1] = 0.0
            orders[index, family.name] = torch.randperm(count, generator=generator)
    return WidthTable(errors, orders, {})


@pytest.mark.parametrize("seed", range(3))
def test_errors_of_masks_are_those_of_their_widths(seed: int) -> None:
    table = random_table(seed)
    masks = torch.rand(7, SPACE.n, generator=torch.Generator().manual_seed(seed)) < 0.5
    masks[5], masks[6] = True, False
    got = table.errors_of(masks, SPACE)
    assert (got.shape, got.dtype) == ((7, 5), torch.float64)
    for row, mask in zip(got.tolist(), masks, strict=True):
        expected = []
        for family in SPACE.families:
            for index, part in enumerate(SPACE.per_layer(mask, family.name)):
                expected.append(float(table.errors[index, family.name][sum(part.tolist())]))
        assert row == expected


def lower_hull(points: list[float], places: list[int]) -> list[float]:
    """The greatest convex function below the points, by cost: at each place the least of all chords over it."""
    actual = []
    for at in range(len(points)):
        chords = [points[at]]
        for left, right in product(range(at), range(at + 1, len(points))):
            share = (places[at] - places[left]) / (places[right] - places[left])
            chords.append(points[left] + (points[right] - points[left]) * share)
        actual.append(min(chords))
    return actual


@pytest.mark.parametrize("seed", range(5))
def test_priorities_are_the_slopes_of_the_lower_hull_per_cost(seed: int) -> None:
    """Falling along the order, and no slope below nothing."""
    table = random_table(seed)
    values = table.priorities(SPACE)
    assert (values.shape, values.dtype) == ((SPACE.n,), torch.float64)
    for family in SPACE.families:
        for index, part in enumerate(SPACE.per_layer(values, family.name)):
            costs = costs_along(table, family, index)
            hull = lower_hull(table.errors[index, family.name].tolist(), [0, *accumulate(costs)])
            along = part[table.orders[index, family.name]].exp().tolist()
            gains = [(before - after) / cost for (before, after), cost in zip(pairwise(hull), costs, strict=True)]
            assert along == pytest.approx([max(gain, 1e-30) for gain in gains], rel=2 * TIE, abs=1e-29)


def best_of(table: WidthTable, threshold: float) -> list[set[int]]:
    """By pair every width that is best where a unit of cost is worth `threshold`."""
    actual = []
    for family in SPACE.families:
        for index in range(len(family.counts)):
            curve = table.errors[index, family.name]
            totals = curve + threshold * torch.tensor([0, *accumulate(costs_along(table, family, index))])
            actual.append(set((totals <= totals.min() + 1e-9).nonzero().flatten().tolist()))
    return actual


@given(st.integers(0, 1000), st.floats(0.001, 0.3))
@settings(deadline=None, max_examples=60)
def test_units_above_a_threshold_are_the_best_widths_at_that_price(seed: int, threshold: float) -> None:
    """Whatever the curves look like: error + price · cost is least over all widths of every layer."""
    table = random_table(seed)
    mask = table.priorities(SPACE).exp() > threshold
    widths = torch.zeros(5, dtype=torch.int64).index_add_(0, SPACE.pair_of, mask.long())
    for kept, best in zip(widths.tolist(), best_of(table, threshold), strict=True):
        assert kept in best


@pytest.mark.parametrize("solve", [True, False])
@pytest.mark.parametrize("families", [("attention", "ffn"), ("ffn",)])
def test_priorities_fall_strictly_along_every_layers_order(solve: bool, families: tuple[str, ...]) -> None:
    """With ties a sample would keep units that the projection of its width is not made for."""
    model = tiny_model("llama-gqa")
    table, (space, _) = width_table(model, DAMPING, families=families, solve=solve), units_of(model, families)
    values = table.priorities(space)
    for family in space.families:
        for index, part in enumerate(space.per_layer(values, family.name)):
            assert (part[table.orders[index, family.name]].diff() < 0).all()


def test_priorities_fall_even_where_a_later_unit_gains_more() -> None:
    """The gains of all units are then one and the same; the order, which the outputs follow, must still be theirs."""
    space = MaskSpace((Family("ffn", (CHANNELS,) * LAYERS, (5,) * LAYERS),))
    errors = CHANNELS**2 - torch.arange(CHANNELS + 1.0).double().square()
    generator = torch.Generator().manual_seed(0)
    orders = {(index, "ffn"): torch.randperm(CHANNELS, generator=generator) for index in range(LAYERS)}
    values = WidthTable(dict.fromkeys(orders, errors), orders, {}).priorities(space)
    for index, part in enumerate(space.per_layer(values, "ffn")):
        assert (part[orders[index, "ffn"]].diff() < 0).all()
    torch.testing.assert_close(values.exp(), torch.full_like(values, CHANNELS / 5), rtol=2 * TIE, atol=0.0)


# --- pool adjacent violators

GAINS = st.lists(st.floats(-100, 100).map(lambda value: round(value, 3)), max_size=12)


def doubles(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def gains_and_costs(draw: st.DrawFn) -> tuple[list[float], list[float]]:
    """Gains, and costs that are all 1 or not."""
    gains = draw(GAINS)
    if draw(st.booleans()):
        return gains, [1.0] * len(gains)
    costs = draw(st.lists(st.integers(1, 20), min_size=len(gains), max_size=len(gains)))
    return gains, [float(cost) for cost in costs]


@given(gains_and_costs())
@settings(deadline=None)
def test_falling_is_the_isotonic_regression(problem: tuple[list[float], list[float]]) -> None:
    """By the min-max formula: over all runs that hold a place, the least over where they begin of the greatest mean."""
    gains, costs = problem

    def mean(first: int, last: int) -> float:
        return sum(gains[first : last + 1]) / sum(costs[first : last + 1])

    expected = [
        min(max(mean(first, last) for last in range(place, len(gains))) for first in range(place + 1))
        for place in range(len(gains))
    ]
    torch.testing.assert_close(_falling(doubles(gains), doubles(costs)), doubles(expected), rtol=1e-9, atol=1e-9)


@given(gains_and_costs())
@settings(deadline=None)
def test_falling_never_rises_keeps_the_sum_and_changes_nothing_twice(
    problem: tuple[list[float], list[float]],
) -> None:
    gains, costs = problem
    fallen = _falling(doubles(gains), doubles(costs))
    assert fallen.dtype == torch.float64
    assert (fallen.diff() <= 0).all()
    assert float(fallen @ doubles(costs)) == pytest.approx(sum(gains), abs=1e-9)
    torch.testing.assert_close(_falling(fallen * doubles(costs), doubles(costs)), fallen)
    ordered = doubles(sorted(gains, reverse=True))
    assert torch.equal(_falling(ordered, torch.ones_like(ordered)), ordered)
