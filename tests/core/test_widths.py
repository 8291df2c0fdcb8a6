"""The policy over layers: its samples, the regression that it learns by, and that it finds the best widths."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pgprune_cli.core import widths
from pgprune_cli.core.projection import hard_mask
from pgprune_cli.core.space import Family, MaskSpace, budget_of
from pgprune_cli.core.widths import (
    FAMILY_SPREAD,
    LEAST_SPREAD,
    RANGE,
    SPREAD,
    WidthState,
    begin,
    priorities,
    propose,
    sensitivities,
    update,
)

SPACE = MaskSpace((Family("attention", (3, 3), (8, 8)), Family("ffn", (7, 5, 6), (3, 3, 3))))
J = 5
FAMILY = torch.tensor([0, 0, 1, 1, 1])
TRUE = torch.tensor([0.7, 1.3, 3.0, 2.0, 4.0], dtype=torch.float64)


def same(left: WidthState, right: WidthState) -> bool:
    """Bit for bit, in every field."""
    pairs = [(getattr(left, entry.name), getattr(right, entry.name)) for entry in fields(WidthState)]
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def observed_samples(
    steps: int, masks_per_step: int, true: Tensor = TRUE, noise: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Errors `(N, J)`, losses that are linear in them but for each step's own constant, and the steps `(N,)`."""
    generator = torch.Generator().manual_seed(seed)
    errors = torch.rand(steps * masks_per_step, len(true), generator=generator, dtype=torch.float64)
    sample_steps = torch.arange(steps).repeat_interleave(masks_per_step)
    constants = 10 * torch.randn(steps, generator=generator, dtype=torch.float64)
    deviates = torch.randn(len(errors), generator=generator, dtype=torch.float64)
    return errors, errors @ true + constants[sample_steps] + noise * deviates, sample_steps


def normed(sensitivity: Tensor) -> Tensor:
    """Only ratios of sensitivities matter."""
    return sensitivity / sensitivity.mean()


# --- samples


def test_a_search_begins_without_offsets_at_the_starting_spread() -> None:
    state = begin(SPACE, 0)
    assert state.mean.tolist() == [0.0] * J
    assert state.spread.tolist() == [SPREAD] * J
    assert (state.errors.shape, state.losses.shape, state.sample_steps.shape) == ((0, J), (0,), (0,))
    assert (state.step, state.skipped) == (0, 0)


@pytest.mark.parametrize("masks_per_step", [1, 2, 5, 8])
def test_samples_come_in_mirrored_pairs_around_the_mean(masks_per_step: int) -> None:
    start = replace(begin(SPACE, 0), mean=torch.linspace(-1, 1, J, dtype=torch.float64))
    state, offsets = propose(start, masks_per_step, SPACE)
    assert (offsets.shape, offsets.dtype) == ((masks_per_step, J), torch.float64)
    around = offsets - start.mean
    pairs = masks_per_step // 2
    torch.testing.assert_close(around[: 2 * pairs : 2], -around[1 : 2 * pairs : 2])
    assert len({tuple(row.abs().round(decimals=9).tolist()) for row in around}) == (masks_per_step + 1) // 2
    assert same(replace(state, rng=start.rng), start)  # only the generator has moved


def test_the_seed_and_the_state_of_the_generator_decide_the_samples() -> None:
    state, offsets = propose(begin(SPACE, 0), 6, SPACE)
    assert torch.equal(propose(begin(SPACE, 0), 6, SPACE)[1], offsets)
    assert not torch.equal(propose(begin(SPACE, 1), 6, SPACE)[1], offsets)
    assert not torch.equal(propose(state, 6, SPACE)[1], offsets)
    torch.manual_seed(123)  # of the global generator they know nothing
    assert torch.equal(propose(begin(SPACE, 0), 6, SPACE)[1], offsets)


def test_the_spread_of_samples_is_the_pairs_own_and_the_families() -> None:
    """Covariance: spread² on the diagonal, and FAMILY_SPREAD² wherever two pairs are of one family."""
    spread = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25], dtype=torch.float64)
    _, offsets = propose(replace(begin(SPACE, 0), spread=spread), 20_000, SPACE)
    half = offsets[::2]
    assert half.mean(0).abs().max() < 5 * 0.5 / math.sqrt(len(half))
    expected = torch.zeros(J, J, dtype=torch.float64)
    for left, right in product(range(J), repeat=2):
        expected[left, right] += FAMILY_SPREAD**2 if FAMILY[left] == FAMILY[right] else 0.0
        expected[left, right] += float(spread[left]) ** 2 if left == right else 0.0
    torch.testing.assert_close(half.T.cov(), expected, atol=0.01, rtol=0.0)


def test_a_units_priority_gets_the_offset_of_its_pair() -> None:
    base = torch.randn(SPACE.n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    offsets = torch.arange(1.0, J + 1, dtype=torch.float64)
    added = [float(offset) for offset, count in zip(offsets, (3, 3, 7, 5, 6), strict=True) for _ in range(count)]
    torch.testing.assert_close(priorities(base, offsets, SPACE) - base, torch.tensor(added, dtype=torch.float64))


# --- sensitivities


@pytest.mark.parametrize(("steps", "masks_per_step"), [(1, 40), (10, 4), (30, 8), (40, 2)])
def test_sensitivities_of_linear_losses_are_recovered(steps: int, masks_per_step: int) -> None:
    """Whatever each batch adds to all of its samples."""
    sensitivity, doubt = sensitivities(*observed_samples(steps, masks_per_step), FAMILY)
    torch.testing.assert_close(normed(sensitivity), normed(TRUE), rtol=1e-4, atol=0.0)
    assert (doubt < 1e-3).all()


def test_with_noise_more_samples_come_closer() -> None:
    misses = []
    for steps in (5, 50, 500):
        actual = [sensitivities(*observed_samples(steps, 6, noise=0.5, seed=seed), FAMILY)[0] for seed in range(10)]
        misses.append(float(torch.stack([(normed(fit) / normed(TRUE)).log().square().mean() for fit in actual]).mean()))
    assert misses[0] > 3 * misses[1] > 9 * misses[2]


def test_the_greatest_family_is_one_and_the_ratio_between_families_is_learned() -> None:
    """All pairs of a family equal: what is left to learn are the families, far apart or near."""
    for ratio in (1.5, 3.0, 4.5):
        true = torch.where(FAMILY == 0, 0.2, 0.2 * ratio).double()
        sensitivity, _ = sensitivities(*observed_samples(20, 6, true), FAMILY)
        torch.testing.assert_close(sensitivity, torch.where(FAMILY == 0, 1 / ratio, 1.0).double(), rtol=1e-4, atol=0.0)


def test_no_family_falls_further_behind_than_the_range() -> None:
    """Whole families that do not matter, or that more error seems to help, still count a little."""
    for small in (0.0, -1.0):
        true = torch.where(FAMILY == 0, small, 1.0).double()
        sensitivity, _ = sensitivities(*observed_samples(20, 6, true), FAMILY)
        assert (sensitivity > 0).all()
        assert (sensitivity[:2] <= 1 / RANGE + 1e-9).all()
        assert (sensitivity[2:] > 0.9).all()


@given(st.integers(0, 10_000), st.floats(0.0, 3.0), st.integers(1, 6), st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_every_sensitivity_is_positive_and_within_the_range(
    seed: int, noise: float, steps: int, masks_per_step: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    true = 3 * torch.randn(J, generator=generator, dtype=torch.float64)
    sensitivity, doubt = sensitivities(*observed_samples(steps, masks_per_step, true, noise, seed), FAMILY)
    assert sensitivity.isfinite().all()
    assert (sensitivity >= 1 / RANGE**2 - 1e-12).all()
    assert (sensitivity <= RANGE + 1e-12).all()
    assert ((doubt >= 0) & (doubt <= 1)).all()


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_what_a_batch_adds_to_all_its_samples_says_nothing(noise: float) -> None:
    errors, losses, sample_steps = observed_samples(12, 5, noise=noise)
    constants = 100 * torch.randn(12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    before, doubt_before = sensitivities(errors, losses, sample_steps, FAMILY)
    after, doubt_after = sensitivities(errors, losses + constants[sample_steps], sample_steps, FAMILY)
    torch.testing.assert_close(normed(after), normed(before), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(doubt_after, doubt_before, rtol=1e-6, atol=1e-5)


def test_the_unit_of_losses_and_the_order_of_samples_do_not_matter() -> None:
    errors, losses, sample_steps = observed_samples(12, 5, noise=0.3)
    before = sensitivities(errors, losses, sample_steps, FAMILY)
    shuffled = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    for changed in (
        (errors, 1000 * losses, sample_steps),
        (errors[shuffled], losses[shuffled], sample_steps[shuffled]),
    ):
        for expected, actual in zip(before, sensitivities(*changed, FAMILY), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [10.0, 1e3, 1e6, -1e3])
@pytest.mark.parametrize("place", [0, 13, 47])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_gross_outlier_hardly_matters(size: float, place: int, noise: float) -> None:
    """One loss of sixty that nothing explains: what is found is about what the others say."""
    errors, losses, sample_steps = observed_samples(12, 5, noise=noise)
    others = torch.arange(60) != place
    expected, _ = sensitivities(errors[others], losses[others], sample_steps[others], FAMILY)
    losses[place] += size
    actual, _ = sensitivities(errors, losses, sample_steps, FAMILY)
    assert float((normed(actual) / normed(expected)).log().abs().max()) < (1e-4 if noise == 0.0 else 0.1)


@pytest.mark.parametrize("losses", [[2.1] * 6, [0.1] * 3 + [0.3] * 3, [5.0], []])
@pytest.mark.parametrize("seed", range(5))
def test_losses_that_tell_nothing_give_all_one(losses: list[float], seed: int) -> None:
    """Equal within each step, or one alone; whatever the last bit of their mean."""
    errors = torch.rand(len(losses), J, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sample_steps = torch.arange(len(losses)) // 3
    sensitivity, doubt = sensitivities(errors, torch.tensor(losses, dtype=torch.float64), sample_steps, FAMILY)
    assert sensitivity.tolist() == doubt.tolist() == [1.0] * J


def test_errors_that_seem_to_help_all_over_are_not_believed() -> None:
    sensitivity, doubt = sensitivities(*observed_samples(10, 6, -TRUE), FAMILY)
    assert sensitivity.tolist() == doubt.tolist() == [1.0] * J


def test_doubt_falls_with_samples_and_is_of_what_was_not_tried() -> None:
    doubts = [
        torch.stack([sensitivities(*observed_samples(steps, 6, noise=2.0, seed=seed), FAMILY)[1] for seed in range(5)])
        for steps in (2, 10, 100)
    ]
    assert float(doubts[0].mean()) > float(doubts[1].mean()) > float(doubts[2].mean())
    errors, losses, sample_steps = observed_samples(50, 6, noise=0.5)
    errors, losses = errors.clone(), losses - errors[:, 3] * TRUE[3]
    errors[:, 3] = 0.4  # never moved
    _, doubt = sensitivities(errors, losses, sample_steps, FAMILY)
    assert float(doubt[3]) > 0.99
    assert (doubt[[0, 1, 2, 4]] < 0.5).all()


def test_the_ridge_is_the_posterior_of_its_prior_and_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one step of the fixed point, at the prior and noise that it starts from, by Bayes on (w, y) jointly."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(9, generator=generator, dtype=torch.float64)
    monkeypatch.setattr(widths, "REFINEMENTS", 1)
    mean, _ = widths._ridge(x, y)
    prior, noise = 0.25, float(y.square().mean())
    # w | y of the joint Gaussian: Cov(w, y) Cov(y)⁻¹ y, the other way round than by the normal equations.
    joint = prior * x @ x.T + noise * torch.eye(9, dtype=torch.float64)
    torch.testing.assert_close(mean, prior * x.T @ torch.linalg.solve(joint, y))


def log_evidence(x: Tensor, y: Tensor, prior: float, noise: float) -> float:
    """log N(y; 0, τ² x xᵀ + σ² I)."""
    joint = prior * x @ x.T + noise * torch.eye(len(y), dtype=torch.float64)
    return float(torch.distributions.MultivariateNormal(torch.zeros(len(y), dtype=torch.float64), joint).log_prob(y))


@pytest.mark.parametrize("seed", range(4))
def test_the_ridges_strength_is_that_of_the_greatest_evidence(seed: int) -> None:
    """Against a grid of all priors within the limits and all noises; its doubt is the posterior's at that point."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    true = 0.5 * torch.randn(8, generator=generator, dtype=torch.float64)
    y = x @ true + 0.7 * torch.randn(60, generator=generator, dtype=torch.float64)
    grid = [(p, n) for p in torch.logspace(math.log10(0.02), 0, 40) for n in torch.logspace(-1.5, 0.5, 40)]
    prior, noise = max(((float(p), float(n)) for p, n in grid), key=lambda point: log_evidence(x, y, *point))
    mean, doubt = widths._ridge(x, y)
    covariance = torch.linalg.inv(x.T @ x / noise + torch.eye(8, dtype=torch.float64) / prior)
    torch.testing.assert_close(mean, covariance @ x.T @ y / noise, rtol=0.01, atol=0.005)
    torch.testing.assert_close(doubt, (covariance.diagonal() / prior).sqrt(), rtol=0.1, atol=0.0)


@pytest.mark.parametrize("masks_per_step", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_fewer_samples_than_can_tell_the_pairs_apart_still_give_numbers(masks_per_step: int, seed: int) -> None:
    """Two differences are explained by two families alone: nothing is left for the pairs."""
    sensitivity, doubt = sensitivities(*observed_samples(1, masks_per_step, noise=0.1, seed=seed), FAMILY)
    assert sensitivity.isfinite().all()
    assert (sensitivity > 0).all()
    assert doubt.isfinite().all()


# --- steps


def hear(state: WidthState, masks_per_step: int, true: Tensor, noise: float = 0.0) -> WidthState:
    """One step of a search whose errors fall with the offsets, pair by pair, and whose losses are linear in them."""
    state, offsets = propose(state, masks_per_step, SPACE)
    errors = (-offsets).exp()
    generator = torch.Generator().manual_seed(state.step)
    deviates = torch.randn(masks_per_step, generator=generator, dtype=torch.float64)
    return update(state, errors, errors @ true + 3 * math.sin(state.step) + noise * deviates, SPACE)


def test_a_step_remembers_what_it_heard() -> None:
    state = begin(SPACE, 0)
    for masks_per_step in (4, 3, 5):
        state = hear(state, masks_per_step, TRUE)
    assert (state.errors.shape, state.losses.shape) == ((12, J), (12,))
    assert (state.errors.dtype, state.losses.dtype, state.sample_steps.dtype) == (
        torch.float64,
        torch.float64,
        torch.int64,
    )
    assert state.sample_steps.tolist() == [0] * 4 + [1] * 3 + [2] * 5
    assert (state.step, state.skipped) == (3, 0)


def test_mean_and_spread_are_the_log_sensitivity_and_what_is_not_known_of_it() -> None:
    state = begin(SPACE, 0)
    for _ in range(6):
        state = hear(state, 6, TRUE, noise=1.0)
    sensitivity, doubt = sensitivities(state.errors, state.losses, state.sample_steps, FAMILY)
    torch.testing.assert_close(state.mean.exp(), sensitivity)
    torch.testing.assert_close(state.spread, (SPREAD * doubt).clamp_min(LEAST_SPREAD))
    assert LEAST_SPREAD < float(state.spread.mean()) < SPREAD


@pytest.mark.parametrize("noise", [0.0, 0.2, 20.0])
def test_the_spread_stays_between_its_least_and_its_first(noise: float) -> None:
    state = begin(SPACE, 0)
    for _ in range(25):
        state = hear(state, 4, TRUE, noise)
        assert ((state.spread >= LEAST_SPREAD) & (state.spread <= SPREAD)).all()
    if noise == 0.0:
        assert state.spread.tolist() == [LEAST_SPREAD] * J  # all is known, and still something is tried


def test_broken_losses_are_left_out_and_counted() -> None:
    errors, losses, _ = observed_samples(1, 5)
    losses[[1, 3, 4]] = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64)
    state = begin(SPACE, 0)
    moved, alone = update(state, errors, losses, SPACE), update(state, errors[[0, 2]], losses[[0, 2]], SPACE)
    assert same(replace(moved, skipped=0), alone)
    assert not torch.equal(moved.mean, state.mean)
    assert (moved.step, moved.skipped, alone.skipped) == (1, 3, 0)
    again = update(moved, errors, losses, SPACE)
    assert (again.step, again.skipped, again.sample_steps.tolist()) == (2, 6, [0, 0, 1, 1])


@pytest.mark.parametrize(
    "losses", [[2.0] * 4, [math.nan] * 4, [math.inf, 1.0, math.nan, math.nan], [3.1, 3.1, math.inf, 3.1]]
)
def test_losses_that_say_nothing_move_nothing(losses: list[float]) -> None:
    state = begin(SPACE, 0)
    errors, _, _ = observed_samples(1, 4)
    moved = update(state, errors, torch.tensor(losses), SPACE)
    assert torch.equal(moved.mean, state.mean)
    assert torch.equal(moved.spread, state.spread)
    assert (moved.step, moved.skipped) == (1, sum(not math.isfinite(loss) for loss in losses))


def test_a_search_goes_on_bit_for_bit_from_any_of_its_states() -> None:
    """A state rebuilt from copies of its fields is all that the rest of the search depends on."""
    state, states = begin(SPACE, 5), []
    for _ in range(8):
        states.append(state)
        state = hear(state, 3, TRUE, noise=0.5)
    for again in states[::3]:
        values = {entry.name: getattr(again, entry.name) for entry in fields(WidthState)}
        copies = {name: value.clone() if isinstance(value, Tensor) else value for name, value in values.items()}
        going = WidthState(**copies)
        while going.step < 8:
            going = hear(going, 3, TRUE, noise=0.5)
        assert same(going, state)


# --- what a search comes to

SMALL = MaskSpace((Family("attention", (4, 4), (3, 3)), Family("ffn", (6, 5, 6), (3, 3, 3))))
BUDGET = budget_of(SMALL, 0.45, "global")


def curves(seed: int) -> list[Tensor]:
    """By pair the error of keeping 0, 1, … units: convex, down to 0."""
    generator = torch.Generator().manual_seed(seed)
    actual = []
    for count in SMALL.pair_counts.tolist():
        gains = torch.rand(count, generator=generator, dtype=torch.float64).add(0.1).sort(descending=True).values
        actual.append(gains.sum() - torch.cat([torch.zeros(1, dtype=torch.float64), gains.cumsum(0)]))
    return actual


def errors_of(mask: Tensor, by_pair: list[Tensor]) -> Tensor:
    kept = torch.zeros(J, dtype=torch.int64).index_add_(0, SMALL.pair_of, mask.long())
    return torch.stack([curve[int(width)] for curve, width in zip(by_pair, kept, strict=True)])


def best_loss(by_pair: list[Tensor], true: Tensor) -> float:
    """Of all combinations of widths within the budget the least Σ sensitivity · error."""
    (constraint,) = BUDGET
    return min(
        float(sum(true[j] * by_pair[j][width] for j, width in enumerate(kept)))
        for kept in product(*(range(count + 1) for count in SMALL.pair_counts.tolist()))
        if sum(kept) * 3 <= constraint.kept
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_search_ends_at_the_widths_that_are_best_for_the_loss(seed: int) -> None:
    """Additive losses, with noise and with batches of different height, against all combinations of widths."""
    by_pair = curves(seed)
    base = torch.cat([curve.diff().neg().log() for curve in by_pair])
    expected = best_loss(by_pair, TRUE)
    losses, state = [], begin(SMALL, seed)
    for step in range(41):
        decided = hard_mask(priorities(base, state.mean, SMALL), SMALL, BUDGET)
        losses.append(float(errors_of(decided, by_pair) @ TRUE))
        state, offsets = propose(state, 6, SMALL)
        masks = [hard_mask(priorities(base, offset, SMALL), SMALL, BUDGET) for offset in offsets]
        errors = torch.stack([errors_of(mask, by_pair) for mask in masks])
        noise = 0.05 * torch.randn(6, generator=torch.Generator().manual_seed(1000 * seed + step), dtype=torch.float64)
        state = update(state, errors, errors @ TRUE + 10 * math.sin(step) + noise, SMALL)
    assert min(losses) >= expected - 1e-9
    assert losses[0] > 1.05 * expected  # where every pair counts the same
    assert losses[-1] - expected < 0.1 * (losses[0] - expected)
