"""The policies where numbers end: losses that overflow, θ next to nothing, budgets of all and of nothing, one unit."""

from __future__ import annotations

import math

import pytest
import torch

from pgprune_cli.core import units
from pgprune_cli.core import widths as layers
from pgprune_cli.core.policy import entropy, sample, starting_theta
from pgprune_cli.core.projection import hard_mask, project
from pgprune_cli.core.space import Family, MaskSpace, budget_of

SPACE = MaskSpace((Family("attention", (4, 4, 4), (512, 512, 512)), Family("ffn", (10, 7, 12), (3, 3, 3))))
ONE = MaskSpace((Family("attention", (1,), (5,)), Family("ffn", (1,), (3,))))


def assert_within(theta: torch.Tensor, space: MaskSpace, budget) -> None:
    """θ is a probability everywhere, and costs what the budget says."""
    assert theta.isfinite().all() and theta.min() >= 0.0 and theta.max() <= 1.0
    for constraint in budget:
        cost = float((theta * space.costs)[constraint.units].sum())
        assert cost == pytest.approx(constraint.kept, rel=1e-9, abs=1e-9 * constraint.total)


def searched(space, budget, steps: int, losses_of, estimator: str = "rloo", rate: float = 0.05, seed: int = 0):
    """The units policy alone; asserts after each step that θ is within its bounds and its budget."""
    theta = starting_theta(torch.arange(space.n, dtype=torch.float64), space, budget, "sigmap", 1.0)
    state = units.begin(theta, seed)
    for _ in range(steps):
        state, masks = units.propose(state, 4)
        state = units.update(state, masks, losses_of(masks), space, budget, estimator, rate)
        assert_within(state.theta, space, budget)
    return state


def usual(masks: torch.Tensor) -> torch.Tensor:
    """Losses that fall with what is kept, some units mattering more."""
    return 5.0 - masks.double() @ torch.linspace(0.0, 0.2, masks.shape[1], dtype=torch.float64)


def long_run(steps: int, estimator: str, scope: str) -> None:
    budget = budget_of(SPACE, 0.5, scope)
    state = searched(SPACE, budget, steps, usual, estimator)
    assert state.step == steps
    again = hard_mask(state.theta, SPACE, budget)
    assert all(int(SPACE.costs[c.units][again[c.units]].sum()) <= c.kept for c in budget)


@pytest.mark.parametrize("estimator", ["rloo", "paper"])
@pytest.mark.parametrize("scope", ["global", "per-family", "per-layer"])
def test_two_thousand_steps_keep_the_budget_and_the_bounds(estimator, scope) -> None:
    long_run(2_000, estimator, scope)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("estimator", ["rloo", "paper"])
def test_a_hundred_thousand_steps_keep_the_budget_and_the_bounds(estimator) -> None:
    long_run(100_000, estimator, "global")


@pytest.mark.parametrize("huge", [1e4, 1e16, 1e30, 3e38])
@pytest.mark.parametrize("estimator", ["rloo", "paper"])
@pytest.mark.parametrize("scope", ["global", "per-family"])
def test_losses_next_to_overflow_break_no_budget(huge, estimator, scope) -> None:
    def losses(masks: torch.Tensor) -> torch.Tensor:
        actual = usual(masks)
        actual[masks[:, 3]] *= huge
        return actual

    searched(SPACE, budget_of(SPACE, 0.5, scope), 60, losses, estimator)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_overflow_are_left_out(bad) -> None:
    def losses(masks: torch.Tensor) -> torch.Tensor:
        return usual(masks).where(~masks[:, 3], bad)

    state = searched(SPACE, budget_of(SPACE, 0.5, "global"), 60, losses)
    assert 0 < state.skipped < 4 * 60
    assert state.baseline is None or math.isfinite(state.baseline)
    state = searched(SPACE, budget_of(SPACE, 0.5, "global"), 5, lambda masks: torch.full((len(masks),), bad))
    assert (state.skipped, state.baseline) == (20, None)


@pytest.mark.parametrize("tiny", [5e-324, 1e-310, 1e-17])
def test_theta_next_to_nothing_and_to_certainty(tiny) -> None:
    theta = torch.full((SPACE.n,), 0.5, dtype=torch.float64)
    theta[::3], theta[1::3] = tiny, 1.0 - 2.0**-53
    budget = budget_of(SPACE, 1.0 - float((theta * SPACE.costs).sum() / SPACE.costs.sum()), "global")
    assert entropy(theta).isfinite()
    masks = torch.stack([torch.arange(SPACE.n) % 2 == 0, torch.arange(SPACE.n) % 2 == 1])  # the rarest draws there are
    for estimator in ("rloo", "paper"):
        losses = torch.tensor([3.0, 4.0], dtype=torch.float64)
        state = units.update(units.begin(theta, 0), masks, losses, SPACE, budget, estimator, 0.05)
        assert_within(state.theta, SPACE, budget)


@pytest.mark.parametrize("scope", ["global", "per-family", "per-layer"])
@pytest.mark.parametrize("space", [SPACE, ONE], ids=["many units", "one unit"])
@pytest.mark.parametrize("sparsity", [0.0, 1e-12, 0.5, 0.9999, 1.0 - 2.0**-53])
def test_budgets_of_all_and_of_next_to_nothing(sparsity, space, scope) -> None:
    budget = budget_of(space, sparsity, scope)
    state = searched(space, budget, 20, usual)
    mask = hard_mask(state.theta, space, budget)
    if sparsity < 1e-9:
        assert mask.all() and state.theta.min() == 1.0
    if sparsity > 1.0 - 1e-9:
        assert not mask.any() and state.theta.max() == 0.0
    state = layers.begin(space, 0)
    for _ in range(5):
        state, offsets = layers.propose(state, 4, space)
        state = layers.update(state, offsets.exp(), usual(offsets), space)
        assert state.mean.isfinite().all() and state.spread.isfinite().all()
        assert not hard_mask(layers.priorities(torch.zeros(space.n), state.mean, space), space, budget).all() or (
            sparsity < 1e-9
        )


@pytest.mark.parametrize("start", ["sigmap", "linear"])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e300, 5e-324])
def test_a_family_of_equal_scores_starts_even(start, value) -> None:
    scores = torch.arange(SPACE.n, dtype=torch.float64)
    ffn = SPACE.slice_of("ffn")
    scores[ffn] = value
    budget = budget_of(SPACE, 0.5, "per-family")
    theta = starting_theta(scores, SPACE, budget, start, 0.3)
    assert_within(theta, SPACE, budget)
    assert theta[ffn].max() - theta[ffn].min() < 1e-12


@pytest.mark.parametrize("start", ["sigmap", "linear"])
@pytest.mark.parametrize("temperature", [1e-100, 1e-3, 1e300])
@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1.0, 1e160, 1e300])
def test_scores_of_any_size_and_any_temperature_give_a_start(scale, start, temperature) -> None:
    budget = budget_of(SPACE, 0.5, "global")
    theta = starting_theta(torch.arange(SPACE.n, dtype=torch.float64) * scale, SPACE, budget, start, temperature)
    assert_within(theta, SPACE, budget)


@pytest.mark.parametrize("huge", [1e8, 1e30, 1e300])
def test_the_projection_is_exact_however_far_away(huge) -> None:
    expected = torch.linspace(-1.0, 1.0, SPACE.n, dtype=torch.float64)
    budget = budget_of(SPACE, 0.4, "global")
    for far in (expected * huge, expected.where(expected < 0.9, huge), expected.where(expected > -0.9, -huge)):
        assert_within(project(far, SPACE, budget), SPACE, budget)


@pytest.mark.parametrize("huge", [1e16, 1e38])
@pytest.mark.parametrize("what", ["losses", "errors"])
def test_the_widths_policy_stays_finite(huge, what) -> None:
    state = layers.begin(SPACE, 0)
    for _ in range(10):
        state, offsets = layers.propose(state, 4, SPACE)
        errors, losses = (-offsets).exp(), offsets.exp().sum(1)
        if what == "losses":
            losses[0] *= huge
        else:
            errors[:, 0] *= huge
        state = layers.update(state, errors, losses, SPACE)
        assert state.mean.isfinite().all() and state.spread.isfinite().all()


@pytest.mark.parametrize("blocks", [[0], [0, 1, 2], list(range(6))])
def test_blocks_without_error_teach_the_widths_policy_nothing_wrong(blocks) -> None:
    state = layers.begin(SPACE, 0)
    for _ in range(10):
        state, offsets = layers.propose(state, 4, SPACE)
        errors = (-offsets).exp()
        errors[:, blocks] = 0.0
        state = layers.update(state, errors, errors.sum(1) + 2.0, SPACE)
        assert state.mean.isfinite().all() and state.spread.isfinite().all()


def test_the_same_seed_gives_the_same_search_twice() -> None:
    budget = budget_of(SPACE, 0.5, "global")
    left, two, right = (searched(SPACE, budget, 50, usual, seed=seed).theta for seed in (3, 3, 4))
    assert left.numpy().tobytes() == two.numpy().tobytes() != right.numpy().tobytes()
    assert sample(left, 5, torch.Generator().manual_seed(1)).equal(sample(two, 5, torch.Generator().manual_seed(1)))
