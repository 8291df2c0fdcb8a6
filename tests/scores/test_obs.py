"""The greedy removal order, compared with a greedy that solves every least-squares problem from scratch."""

from collections.abc import Iterable

import pytest
import torch
from helpers.grids import chain_length, is_regular
from helpers.memory import Allocations
from torch import Tensor

from pgprune_cli.core.grid import Grid, GridCost, chain_of_removal, is_chain
from pgprune_cli.scores.obs import DAMPING, _damped_inverse, chain_errors, obs, removal_order
from pgprune_cli.scores.statistics import BlockStatistics


def problem(units: int, width: int, tokens: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a weight `(5, in)` and correlated inputs `(tokens, in)`, float64."""
    generator = torch.Generator().manual_seed(seed)
    size = units * width
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, size, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(5, size, generator=generator, dtype=torch.float64), inputs


def covariance_of(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs / len(inputs)


def block_of(weight: Tensor, covariance: Tensor, units: int, root: Tensor | None = None) -> BlockStatistics:
    """Return the statistics of a block. Without a root, an output error costs its squared length."""
    root = torch.eye(len(weight), dtype=torch.float64) if root is None else root
    grid = Grid(1, units, shared_rows=False)
    return BlockStatistics(grid, GridCost(1), {"o": weight}, {}, seed=0, covariance=covariance, error_root=root)


def least_error(weight: Tensor, inputs: Tensor, kept: list[int], damping: float = DAMPING) -> float:
    """Return the squared error per token of the best fit with the kept columns. The ridge is extra rows of data."""
    ridge = (damping * covariance_of(inputs).diagonal().mean()).sqrt() * torch.eye(inputs.shape[1]).double()
    data = torch.cat([inputs / len(inputs) ** 0.5, ridge])
    target = data @ weight.T
    if not kept:
        return float(target.square().sum())
    fitted = data[:, kept] @ torch.linalg.lstsq(data[:, kept], target).solution
    return float((target - fitted).square().sum())


def columns(units: Iterable[int], width: int) -> list[int]:
    """Return the input columns of some units, each `width` wide."""
    return [unit * width + place for unit in units for place in range(width)]


def greedy_from_scratch(weight: Tensor, inputs: Tensor, units: int, width: int) -> tuple[list[int], list[float]]:
    """Return the removal order and the error after each removal, with every fit solved anew."""
    remaining, order, errors = list(range(units)), [], []
    while remaining:
        error, unit = min(
            (least_error(weight, inputs, columns([kept for kept in remaining if kept != unit], width)), unit)
            for unit in remaining
        )
        remaining.remove(unit)
        order.append(unit)
        errors.append(error)
    return order, errors


@pytest.mark.parametrize(("units", "width", "seed"), [(9, 1, 0), (9, 1, 1), (6, 3, 0), (5, 4, 2), (1, 3, 0)])
def test_removal_order_equals_the_greedy_from_scratch(units: int, width: int, seed: int) -> None:
    weight, inputs = problem(units, width, seed=seed)
    order, errors = removal_order(weight, covariance_of(inputs), units)
    expected_order, expected_errors = greedy_from_scratch(weight, inputs, units, width)
    assert order.tolist() == expected_order
    assert errors.tolist() == pytest.approx(expected_errors, rel=1e-8)


@pytest.mark.parametrize(("units", "width", "per_round"), [(10, 1, 3), (7, 2, 2), (6, 1, 100)])
def test_removal_order_removes_the_cheapest_units_of_a_round_and_returns_exact_errors(units, width, per_round) -> None:
    weight, inputs = problem(units, width)
    order, errors = removal_order(weight, covariance_of(inputs), units, per_round)
    remaining = list(range(units))
    for start in range(0, units, per_round):
        removed = order[start : start + per_round].tolist()
        alone = {
            unit: least_error(weight, inputs, columns([kept for kept in remaining if kept != unit], width))
            for unit in remaining
        }
        assert removed == sorted(remaining, key=alone.__getitem__)[:per_round]
        for unit, error in zip(removed, errors[start : start + per_round].tolist(), strict=True):
            remaining.remove(unit)
            assert error == pytest.approx(least_error(weight, inputs, columns(remaining, width)), rel=1e-8)


def test_removal_order_is_exact_with_few_tokens_and_inactive_inputs() -> None:
    weight, inputs = problem(12, 1, tokens=5)
    inputs[:, [3, 8]] = 0.0
    order, errors = removal_order(weight, covariance_of(inputs), 12)
    expected_order, expected_errors = greedy_from_scratch(weight, inputs, 12, 1)
    assert order.tolist() == expected_order
    assert errors.tolist() == pytest.approx(expected_errors, rel=1e-8)
    assert (errors.diff() >= 0).all()


def test_removal_costs_nothing_when_all_inputs_are_zero() -> None:
    order, errors = removal_order(torch.ones(3, 4), torch.zeros(4, 4), 4)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    assert float(errors.max()) < 1e-20


def test_removing_one_of_two_equal_inputs_is_free_and_removing_the_second_is_not() -> None:
    """Metrics that judge every unit alone, wanda-sp and flap, cannot see this."""
    weight, inputs = problem(6, 1)
    inputs[:, 4] = inputs[:, 1]
    order, errors = removal_order(weight, covariance_of(inputs), 6, damping=1e-9)
    assert int(order[0]) in (1, 4)
    assert float(errors[0]) < 1e-6 * float(errors[1])


def test_removal_order_accepts_any_precision_and_changes_no_argument() -> None:
    weight, inputs = problem(8, 2)
    weight, covariance = weight.bfloat16(), covariance_of(inputs).float()
    weight_before, covariance_before = weight.clone(), covariance.clone()
    order, errors = removal_order(weight, covariance, 8)
    assert torch.equal(weight, weight_before)
    assert torch.equal(covariance, covariance_before)
    assert (order.dtype, errors.dtype) == (torch.int64, torch.float64)


def test_obs_scores_a_unit_by_the_error_after_its_removal() -> None:
    weight, inputs = problem(8, 2)
    covariance = covariance_of(inputs)
    order, errors = removal_order(weight, covariance, 8)
    scores = obs(block_of(weight, covariance, 8))
    assert scores[order].tolist() == errors.tolist()
    assert scores.argsort().tolist() == order.tolist()
    covariance[0, 0] = torch.nan
    assert obs(block_of(weight, covariance, 8)).isnan().all()


def test_obs_weights_errors_by_the_root() -> None:
    """An error costs ‖R (W − W') x‖² per token after refitting the kept weights, as in least squares on R W."""
    weight, inputs = problem(7, 2)
    root = torch.randn(5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    scores = obs(block_of(weight, covariance_of(inputs), 7, root))
    order, errors = greedy_from_scratch(root @ weight, inputs, 7, 2)
    assert scores.argsort().tolist() == order
    assert scores[order].tolist() == pytest.approx(errors, rel=1e-8)
    assert order != greedy_from_scratch(weight, inputs, 7, 2)[0]


def test_obs_removes_units_first_that_write_only_to_a_direction_without_weight() -> None:
    """Their size does not matter."""
    weight, inputs = problem(6, 1)
    weight[0, [2, 5]], weight[1:, [2, 5]] = 1000.0, 0.0
    root = torch.eye(5, dtype=torch.float64)
    root[0, 0] = 0.0
    scores = obs(block_of(weight, covariance_of(inputs), 6, root))
    assert sorted(scores.argsort()[:2].tolist()) == [2, 5]
    assert float(scores[[2, 5]].max()) < 1e-9 * float(scores.max())
    assert sorted(obs(block_of(weight, covariance_of(inputs), 6)).argsort()[-2:].tolist()) == [2, 5]


def test_obs_is_refused_without_covariance_or_root() -> None:
    weight, inputs = problem(6, 1)
    covariance, identity = covariance_of(inputs), torch.eye(5, dtype=torch.float64)
    for incomplete in ({}, {"covariance": covariance}, {"error_root": identity}):
        with pytest.raises(ValueError, match="obs needs calibration text"):
            obs(BlockStatistics(Grid(6, 1), GridCost(1), {"o": weight}, {}, seed=0, **incomplete))


def test_obs_removes_a_hundredth_of_the_units_per_round() -> None:
    weight, inputs = problem(300, 1, tokens=400)
    covariance = covariance_of(inputs)
    order, errors = removal_order(weight, covariance, 300, per_round=3)
    scores = obs(block_of(weight, covariance, 300))
    assert scores[order].tolist() == errors.tolist()
    exact = removal_order(weight, covariance, 300)[1]
    assert errors[149] == pytest.approx(float(exact[149]), rel=0.05)  # greedy is not optimal, so either may be lower
    assert float(errors[-1]) == pytest.approx(least_error(weight, inputs, []), rel=1e-6)


# --- chains

COST = GridCost(element=4, group=4)  # as in attention: queries and output, keys and values
GRIDS = {"MQA": Grid(1, 4), "GQA": Grid(3, 2), "deep groups": Grid(2, 3), "experts": Grid(3, 2, 2, shared_rows=False)}


def chain_from_scratch(
    weight: Tensor, inputs: Tensor, grid: Grid, cost: GridCost, width: int
) -> list[tuple[set[int], float]]:
    """Return the elements of each step with the least-squares error by then. Every candidate is solved from scratch.

    A member of every group: the one whose own removal adds the least error.
    """
    remaining, error, steps = set(range(grid.elements)), 0.0, []

    def error_without(elements: set[int]) -> float:
        return least_error(weight, inputs, columns(sorted(remaining - elements), width))

    while remaining:
        groups = sorted({element // grid.members for element in remaining})
        members = len(remaining) // len(groups)
        now = cost.of(len(groups), members)
        candidates = []
        if len(groups) > grid.min_groups:
            saved = now - cost.of(len(groups) - 1, members)
            for group in groups:
                whole = {element for element in remaining if element // grid.members == group}
                candidates.append(((error_without(whole) - error) / saved, whole))
        if members > 1 or len(groups) == grid.min_groups:
            least = {
                min((e for e in remaining if e // grid.members == group), key=lambda e: error_without({e}))
                for group in groups
            }
            saved = now - cost.of(len(groups), members - 1)
            candidates.append(((error_without(least) - error) / saved, least))
        removed = min(candidates, key=lambda candidate: candidate[0])[1]
        error = error_without(removed)
        remaining -= removed
        steps.append((removed, error))
    return steps


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("seed", range(3))
def test_chain_errors_are_those_of_a_greedy_that_solves_every_problem_from_scratch(
    seed: int, grid: Grid, width: int
) -> None:
    weight, inputs = problem(grid.elements, width, seed=seed)
    errors = chain_errors(weight, covariance_of(inputs), grid, COST)
    steps = chain_from_scratch(weight, inputs, grid, COST, width)
    chain = chain_of_removal(errors)
    assert len(steps) == chain_length(grid) == int(chain.max()) + 1
    for step, (removed, error) in enumerate(steps):
        assert set((chain == len(steps) - 1 - step).nonzero().flatten().tolist()) == removed
        for element in removed:
            assert float(errors[element]) == pytest.approx(error, rel=1e-8)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_error_of_every_width_is_that_of_the_exact_refit(grid: Grid) -> None:
    """Also where a step removes several elements at once."""
    weight, inputs = problem(grid.elements, 2, seed=7)
    errors = chain_errors(weight, covariance_of(inputs), grid, COST)
    chain = chain_of_removal(errors)
    assert is_chain(chain, grid)
    for kept in range(chain_length(grid)):
        mask = chain < kept
        assert is_regular(grid, mask)
        expected = least_error(weight, inputs, columns(mask.nonzero().flatten().tolist(), 2))
        assert float(errors[~mask].max()) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_chain_errors_rise_strictly_even_where_nothing_is_lost(grid: Grid) -> None:
    """Equal errors mean the same step, so elements that cost nothing must still have different errors."""
    weight, inputs = problem(grid.elements, 2)
    errors = chain_errors(torch.zeros_like(weight), covariance_of(inputs), grid, COST)
    assert len(errors.unique()) == chain_length(grid)
    assert float(errors.min()) > 0.0 and float(errors.max()) < 1e-300


@pytest.mark.parametrize("grid", [Grid(3, 2), Grid(2, 3), Grid(4, 3)])
def test_a_target_stops_the_chain_at_its_groups_and_members(grid: Grid) -> None:
    weight, inputs = problem(grid.elements, 1, seed=2)
    for groups in range(1, grid.groups + 1):
        for members in range(1, grid.members + 1):
            errors = chain_errors(weight, covariance_of(inputs), grid, COST, (groups, members))
            kept = errors.isinf()
            assert is_regular(grid, kept) and grid.kept(kept) == (groups, members)
            if not kept.all():
                expected = least_error(weight, inputs, kept.nonzero().flatten().tolist())
                assert float(errors[~kept].max()) == pytest.approx(expected, rel=1e-8)


def test_obs_of_a_grid_removes_what_adds_the_least_error_per_parameter() -> None:
    """With costly keys and values, whole KV heads are removed; with cheap ones, query heads."""
    weight, inputs = problem(6, 2, seed=1)
    grid, root = Grid(3, 2), torch.eye(5, dtype=torch.float64)
    first_steps = []
    for cost in (GridCost(1, 10_000), GridCost(10_000, 1)):
        block = BlockStatistics(
            grid, cost, {"o": weight}, {}, seed=0, covariance=covariance_of(inputs), error_root=root
        )
        scores = obs(block)
        assert torch.equal(scores, chain_errors(weight, covariance_of(inputs), grid, cost))
        first_steps.append((scores == scores.min()).view(3, 2).sum(1).tolist())
    assert sorted(first_steps[0]) == [0, 0, 2]
    assert first_steps[1] == [1, 1, 1] or sorted(first_steps[1]) == [0, 0, 2]
    covariance = covariance_of(inputs)
    covariance[1, 1] = torch.inf
    block = BlockStatistics(grid, GridCost(1), {"o": weight}, {}, seed=0, covariance=covariance, error_root=root)
    assert obs(block).isnan().all()


def test_the_inverse_takes_the_memory_of_two_matrices_beside_the_covariance() -> None:
    """torch.cholesky_inverse would clone its argument, on CUDA twice."""
    covariance = problem(units=1, width=256, tokens=300)[1].float()
    covariance = covariance.T @ covariance
    with Allocations() as allocated:
        inverse = _damped_inverse(covariance, DAMPING)
    assert allocated.peak <= 2.1 * covariance.nbytes
    damped = covariance + DAMPING * covariance.diagonal().mean() * torch.eye(256)
    torch.testing.assert_close(inverse @ damped, torch.eye(256), rtol=0, atol=1e-3)
