"""The search loop as a newcomer meets it: no model, only masks and their losses."""

import math

import pytest
import torch

from pgprune_cli.core.policy import starting_theta
from pgprune_cli.core.projection import hard_mask
from pgprune_cli.core.space import Family, MaskSpace, budget_of
from pgprune_cli.core.units import SearchState, begin, propose, scheduled, update

SPACE = MaskSpace((Family("ffn", (10, 10), (3, 3)),))
BUDGET = budget_of(SPACE, 0.5, "per-family")


def fresh(seed: int = 0) -> SearchState:
    return begin(torch.full((SPACE.n,), 0.5), seed)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("estimator", ["rloo", "paper"])
def test_the_search_finds_the_best_mask(estimator: str, seed: int) -> None:
    """A loss that is linear in the mask has a known best mask: of each family, the units that lower it most."""
    space = MaskSpace((Family("attention", (2, 2), (8, 8)), Family("ffn", (4, 4), (3, 3))))
    budget = budget_of(space, 0.5, "per-family")
    c = -torch.linspace(0.0, 1.0, space.n)[torch.randperm(space.n, generator=torch.Generator().manual_seed(seed))]
    state = begin(starting_theta(torch.ones(space.n), space, budget, "sigmap", 1.0), seed)
    for step in range(800):
        state, masks = propose(state, 4)
        losses = masks.float() @ c
        state = update(state, masks, losses, space, budget, estimator, scheduled(5e-3, "cosine", step, 800))
    best = torch.zeros(space.n, dtype=torch.bool)
    best[c[:4].argsort()[:2]] = True
    best[4 + c[4:].argsort()[:4]] = True
    assert torch.equal(hard_mask(state.theta, space, budget), best)
    assert (state.step, state.skipped) == (800, 0)


def test_units_kept_in_the_better_mask_move_up() -> None:
    state = fresh()
    masks = torch.zeros(2, SPACE.n, dtype=torch.bool)
    masks[0, :10] = masks[1, 10:] = True
    moved = update(state, masks, torch.tensor([1.0, 2.0]), SPACE, BUDGET, "rloo", 0.01)
    assert (moved.theta[:10] > 0.5).all()
    assert (moved.theta[10:] < 0.5).all()
    assert moved.baseline == pytest.approx(1.5)
    assert torch.equal(state.theta, torch.full((SPACE.n,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("estimator", ["rloo", "paper"])
def test_broken_losses_are_left_out_and_counted(estimator: str) -> None:
    state, masks = propose(fresh(), 5)
    losses = torch.tensor([2.0, math.nan, 3.0, math.inf, -math.inf])
    moved = update(state, masks, losses, SPACE, BUDGET, estimator, 0.01)
    alone = update(state, masks[[0, 2]], losses[[0, 2]], SPACE, BUDGET, estimator, 0.01)
    assert moved.skipped == 3
    assert torch.equal(moved.theta, alone.theta)
    assert not torch.equal(moved.theta, state.theta)
    assert moved.baseline == alone.baseline == 2.5
    assert update(moved, masks, losses, SPACE, BUDGET, estimator, 0.01).skipped == 6


@pytest.mark.parametrize("estimator", ["rloo", "paper"])
@pytest.mark.parametrize("losses", [[math.nan, 1.0], [math.inf, math.nan]])
def test_fewer_than_two_good_losses_leave_theta_alone(losses: list[float], estimator: str) -> None:
    state, masks = propose(fresh(), 2)
    moved = update(state, masks, torch.tensor(losses), SPACE, BUDGET, estimator, 0.01)
    assert torch.equal(moved.theta, state.theta)
    assert moved.baseline is None
    assert moved.step == 1
    assert moved.skipped == sum(not math.isfinite(loss) for loss in losses)


def test_the_baseline_moves_a_fifth_of_the_way_under_the_papers_estimator() -> None:
    state, masks = propose(fresh(), 2)
    state = update(state, masks, torch.tensor([3.0, 5.0]), SPACE, BUDGET, "paper", 0.01)
    assert state.baseline == pytest.approx(4.0)
    state = update(state, masks, torch.tensor([9.0, 9.0]), SPACE, BUDGET, "paper", 0.01)
    assert state.baseline == pytest.approx(5.0)


def test_proposing_depends_on_the_state_alone_and_moves_its_generator() -> None:
    state = fresh(seed=7)
    first, masks = propose(state, 4)
    again, same = propose(state, 4)
    assert torch.equal(masks, same)
    assert torch.equal(first.rng, again.rng)
    assert not torch.equal(first.rng, state.rng)
    _, next_masks = propose(first, 4)
    assert not torch.equal(masks, next_masks)
    _, others = propose(fresh(seed=8), 4)
    assert not torch.equal(masks, others)
    assert masks.shape == (4, SPACE.n)


def test_a_state_rebuilt_from_its_parts_goes_on_identically() -> None:
    state, masks = propose(fresh(), 2)
    state = update(state, masks, torch.tensor([1.0, 2.0]), SPACE, BUDGET, "paper", 0.1)
    rebuilt = SearchState(state.theta.clone(), state.baseline, state.step, state.skipped, state.rng.clone())
    assert torch.equal(propose(state, 3)[1], propose(rebuilt, 3)[1])


def test_the_schedules() -> None:
    assert [scheduled(0.3, "constant", step, 10) for step in (0, 5, 9)] == [0.3, 0.3, 0.3]
    assert scheduled(0.3, "cosine", 0, 10) == pytest.approx(0.3)
    assert scheduled(0.3, "cosine", 5, 10) == pytest.approx(0.15)
    assert scheduled(0.3, "cosine", 10, 10) == pytest.approx(0.0)
    quarter = 0.3 * (1 + math.sqrt(0.5)) / 2
    assert scheduled(0.3, "cosine", 25, 100) == pytest.approx(quarter)


@pytest.mark.parametrize("scope", ["per-family", "global"])
@pytest.mark.parametrize("estimator", ["rloo", "paper"])
def test_the_budget_holds_through_any_losses(estimator: str, scope: str) -> None:
    space = MaskSpace((Family("attention", (3, 3), (83, 90)), Family("ffn", (20, 20), (7, 6))))
    budget = budget_of(space, 0.37, scope)
    generator = torch.Generator().manual_seed(0)
    state = begin(starting_theta(torch.rand(space.n, generator=generator), space, budget, "sigmap", 1.0), seed=0)
    for _ in range(300):
        state, masks = propose(state, 3)
        losses = torch.randn(3, generator=generator).exp() * 10
        state = update(state, masks, losses, space, budget, estimator, 0.1)
        assert ((state.theta >= 0) & (state.theta <= 1)).all()
        for constraint in budget:
            spent = float((space.costs * state.theta)[constraint.units].sum())
            assert spent == pytest.approx(constraint.kept, abs=1e-9 * constraint.total)
