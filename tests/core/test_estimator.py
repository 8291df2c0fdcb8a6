"""The estimators, exactly: every combination of K masks of n units is enumerated, so nothing here is statistical."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from helpers.grids import log_probability
from torch import Tensor

from pgprune_cli.core.estimator import BASELINE_RATE, ESTIMATORS, paper, preconditioned_score, rloo

Estimator = Callable[[Tensor, Tensor, Tensor, float | None], tuple[Tensor, float]]


def random_problem(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """θ `(n,)`, all masks `(2^n, n)` and a loss for each `(2^n,)`, without any structure."""
    generator = torch.Generator().manual_seed(seed)
    theta = 0.05 + 0.9 * torch.rand(n, generator=generator, dtype=torch.float64)
    masks = torch.tensor(list(product((False, True), repeat=n)))
    return theta, masks, 3.0 + torch.randn(len(masks), generator=generator, dtype=torch.float64)


def preconditioned_gradient(theta: Tensor, masks: Tensor, losses: Tensor) -> Tensor:
    """√(θ(1 − θ)) · ∇_θ E[L] by differentiating the sum over all masks."""
    variable = theta.clone().requires_grad_()
    (log_probability(variable, masks).exp() * losses).sum().backward()
    assert variable.grad is not None
    return (theta * (1.0 - theta)).sqrt() * variable.grad


def expectation(
    estimator: Estimator, theta: Tensor, masks: Tensor, losses: Tensor, masks_per_step: int, baseline: float | None
) -> Tensor:
    """E of the estimate over all (2^n)^K combinations of masks, each with its probability."""
    probabilities = log_probability(theta, masks).exp()
    total = torch.zeros_like(theta)
    for chosen in product(range(len(masks)), repeat=masks_per_step):
        picked = list(chosen)
        gradient, _ = estimator(theta, masks[picked], losses[picked], baseline)
        total += probabilities[picked].prod() * gradient
    return total


SIZES = [(1, 2), (2, 2), (3, 2), (4, 2), (1, 3), (2, 3), (3, 3), (2, 4)]


@pytest.mark.parametrize("baseline", [None, 2.7])
@pytest.mark.parametrize(("n", "masks_per_step"), SIZES)
def test_leave_one_out_is_unbiased_up_to_the_preconditioner(
    n: int, masks_per_step: int, baseline: float | None
) -> None:
    theta, masks, losses = random_problem(n, seed=n)
    torch.testing.assert_close(
        expectation(rloo, theta, masks, losses, masks_per_step, baseline), preconditioned_gradient(theta, masks, losses)
    )


@pytest.mark.parametrize("baseline", [0.0, 2.7, 50.0])
@pytest.mark.parametrize(("n", "masks_per_step"), SIZES)
def test_the_papers_estimator_is_off_by_the_factor_that_its_docstring_states(
    n: int, masks_per_step: int, baseline: float
) -> None:
    """δ holds λ/K of every L_k, so that Σ_k loses λ of K; whatever else δ holds is independent and drops out."""
    theta, masks, losses = random_problem(n, seed=n)
    factor = (masks_per_step - BASELINE_RATE) / (masks_per_step - 1)
    torch.testing.assert_close(
        expectation(paper, theta, masks, losses, masks_per_step, baseline),
        factor * preconditioned_gradient(theta, masks, losses),
    )


@pytest.mark.parametrize(("n", "masks_per_step"), SIZES)
def test_without_a_baseline_yet_the_papers_estimator_is_unbiased(n: int, masks_per_step: int) -> None:
    """δ is then the whole mean, λ = 1: the factor becomes (K − 1)/(K − 1), and the estimate is leave-one-out's."""
    theta, masks, losses = random_problem(n, seed=n)
    torch.testing.assert_close(
        expectation(paper, theta, masks, losses, masks_per_step, None), preconditioned_gradient(theta, masks, losses)
    )
    chosen = masks[:masks_per_step]
    torch.testing.assert_close(
        paper(theta, chosen, losses[:masks_per_step], None)[0], rloo(theta, chosen, losses[:masks_per_step], None)[0]
    )


def test_the_papers_estimator_by_hand() -> None:
    theta = torch.tensor([0.5, 0.2], dtype=torch.float64)
    masks = torch.tensor([[True, False], [False, True]])
    gradient, moved = paper(theta, masks, torch.tensor([3.0, 5.0], dtype=torch.float64), 2.0)
    assert moved == pytest.approx(0.8 * 2.0 + 0.2 * 4.0)
    first = (3.0 - 2.4) * 0.5 / 0.5 + (5.0 - 2.4) * -0.5 / 0.5
    second = (3.0 - 2.4) * -0.2 / 0.4 + (5.0 - 2.4) * 0.8 / 0.4
    assert gradient.tolist() == pytest.approx([first, second])


def test_leave_one_out_by_hand() -> None:
    """Each loss against the mean of the *others*, written out as such."""
    theta = torch.tensor([0.3], dtype=torch.float64)
    masks = torch.tensor([[True], [False], [True]])
    gradient, watched = rloo(theta, masks, torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64), None)
    deviation = (0.3 * 0.7) ** 0.5
    by_hand = ((1.0 - 4.0) * 0.7 + (2.0 - 3.5) * -0.3 + (6.0 - 1.5) * 0.7) / deviation / 3
    assert gradient.item() == pytest.approx(by_hand)
    assert watched == pytest.approx(3.0)


def test_a_harder_batch_shifts_the_papers_estimate_but_not_leave_one_out() -> None:
    theta, masks, losses = random_problem(3, seed=0)
    picked = [1, 6]
    for shift in (0.5, 7.0):
        easy, hard = losses[picked], losses[picked] + shift
        torch.testing.assert_close(rloo(theta, masks[picked], easy, 3.0)[0], rloo(theta, masks[picked], hard, 3.0)[0])
        difference = paper(theta, masks[picked], hard, 3.0)[0] - paper(theta, masks[picked], easy, 3.0)[0]
        score = preconditioned_score(theta, masks[picked]).sum(0)
        torch.testing.assert_close(difference, (1 - BASELINE_RATE) * shift * score)
        assert difference.abs().max() > 0.1


def test_scores_have_mean_zero_and_variance_one() -> None:
    theta, masks, _ = random_problem(4, seed=5)
    probabilities = log_probability(theta, masks).exp()
    score = preconditioned_score(theta, masks)
    torch.testing.assert_close(probabilities @ score, torch.zeros_like(theta), atol=1e-12, rtol=0.0)
    torch.testing.assert_close(probabilities @ score.square(), torch.ones_like(theta))


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_certain_units_get_no_gradient(name: str) -> None:
    theta = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    masks = torch.tensor([[False, True, True], [False, False, True]])
    gradient, _ = ESTIMATORS[name](theta, masks, torch.tensor([1.0, 9.0], dtype=torch.float64), 2.0)
    assert gradient.isfinite().all()
    assert (gradient[0], gradient[2]) == (0.0, 0.0)
    assert gradient[1] != 0.0


def test_the_moving_rate_is_the_papers() -> None:
    theta, masks = torch.tensor([0.5]), torch.tensor([[True], [False]])
    _, baseline = paper(theta, masks, torch.tensor([1.0, 3.0]), 7.0)
    assert baseline == pytest.approx(0.8 * 7.0 + 0.2 * 2.0)
