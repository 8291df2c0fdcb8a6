"""What the policy samples, what it says of its own masks, and where it starts."""

import math
from itertools import product

import pytest
import torch
from helpers.grids import log_probability
from hypothesis import given, settings
from hypothesis import strategies as st

from pgprune_cli.core.policy import entropy, sample, starting_theta
from pgprune_cli.core.projection import hard_mask
from pgprune_cli.core.space import Family, MaskSpace, budget_of

THETA = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)


def test_units_are_kept_as_often_as_theta_says() -> None:
    masks = sample(THETA, 20_000, torch.Generator().manual_seed(0))
    assert masks.shape == (20_000, 5)
    assert masks.dtype == torch.bool
    # Four standard errors are at most 4 · 0.5 / √20,000 = 0.014.
    torch.testing.assert_close(masks.double().mean(0), THETA, atol=0.015, rtol=0.0)


def test_units_are_kept_independently_of_each_other_and_of_other_masks() -> None:
    masks = sample(torch.full((2,), 0.5, dtype=torch.float64), 20_000, torch.Generator().manual_seed(0))
    assert abs(float((masks[:, 0] & masks[:, 1]).double().mean()) - 0.25) < 0.015
    assert abs(float((masks[:-1, 0] & masks[1:, 0]).double().mean()) - 0.25) < 0.015


def test_zero_and_one_are_certain() -> None:
    masks = sample(THETA, 20_000, torch.Generator().manual_seed(1))
    assert not masks[:, 0].any()
    assert masks[:, 4].all()


def test_the_same_generator_state_gives_the_same_masks() -> None:
    generator = torch.Generator().manual_seed(3)
    first, second = sample(THETA, 50, generator), sample(THETA, 50, generator)
    assert torch.equal(first, sample(THETA, 50, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, second)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
@settings(deadline=None, max_examples=50)
def test_probabilities_of_all_masks_sum_to_one_and_give_the_entropy(values: list[float]) -> None:
    theta = torch.tensor(values, dtype=torch.float64)
    masks = torch.tensor(list(product((False, True), repeat=len(values))))
    logs = log_probability(theta, masks)
    assert logs.shape == (len(masks),)
    assert float(logs.exp().sum()) == pytest.approx(1.0)
    by_enumeration = -sum(math.exp(log) * log for log in logs.tolist() if log > -math.inf)
    assert float(entropy(theta)) == pytest.approx(by_enumeration, abs=1e-12)


def test_log_probability_by_hand() -> None:
    theta = torch.tensor([0.25, 0.5], dtype=torch.float64)
    masks = torch.tensor([[True, False], [False, True]])
    assert log_probability(theta, masks).exp().tolist() == pytest.approx([0.125, 0.375])


def test_entropy_of_a_coin_is_log_two_and_of_certainty_zero() -> None:
    assert float(entropy(torch.tensor([0.5, 0.5], dtype=torch.float64))) == pytest.approx(2 * math.log(2))
    assert float(entropy(torch.tensor([0.0, 1.0], dtype=torch.float64))) == 0.0


# --- the start

SPACE = MaskSpace((Family("attention", (3, 3), (40, 40)), Family("ffn", (6, 4), (3, 3))))


def some_saliency(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp() * 100


@given(
    start=st.sampled_from(["sigmap", "linear", "rank", "global-rank"]),
    temperature=st.sampled_from([0.05, 0.3, 1.0, 5.0]),
    sparsity=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.8]),
    scope=st.sampled_from(["per-family", "global"]),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=100)
def test_the_start_meets_the_budget_and_keeps_the_order_of_every_layer(
    start: str, temperature: float, sparsity: float, scope: str, seed: int
) -> None:
    scores = some_saliency(SPACE.n, seed)
    budget = budget_of(SPACE, sparsity, scope)
    theta = starting_theta(scores, SPACE, budget, start, temperature)
    assert ((theta >= 0) & (theta <= 1)).all()
    for constraint in budget:
        spent = float((SPACE.costs * theta)[constraint.units].sum())
        assert spent == pytest.approx(constraint.kept, rel=1e-12, abs=1e-9)
    for family in SPACE.families:
        views = zip(SPACE.per_layer(theta, family.name), SPACE.per_layer(scores, family.name), strict=True)
        for part, values in views:
            assert (part[values.argsort()].diff() >= 0).all()


def test_sigmap_is_a_sigmoid_of_the_z_score_within_the_layer_shifted_to_the_keep_fraction() -> None:
    values = [1.0, 2.0, 6.0, 30.0, 20.0, 10.0]
    space = MaskSpace((Family("ffn", (3, 3), (2, 2)),))
    theta = starting_theta(
        torch.tensor(values, dtype=torch.float64), space, budget_of(space, 0.5, "global"), "sigmap", 1.0
    )
    expected = []
    for layer in (values[:3], values[3:]):
        mean = sum(layer) / 3
        deviation = math.sqrt(sum((v - mean) ** 2 for v in layer) / 3)
        expected += [1 / (1 + math.exp(-(v - mean) / deviation)) for v in layer]
    shift = 0.5 - sum(expected) / 6
    assert theta.tolist() == pytest.approx([value + shift for value in expected])


def test_linear_runs_from_the_least_to_the_greatest_of_a_layer_then_is_shifted() -> None:
    values = torch.tensor([1.0, 2.0, 5.0, 40.0, 30.0, 20.0], dtype=torch.float64)
    space = MaskSpace((Family("ffn", (3, 3), (2, 2)),))
    theta = starting_theta(values, space, budget_of(space, 0.5, "global"), "linear", 2.0)
    unshifted = [0.25, 0.375, 0.75, 0.75, 0.5, 0.25]
    shift = 0.5 - sum(unshifted) / 6
    assert theta.tolist() == pytest.approx([value + shift for value in unshifted])


@pytest.mark.parametrize("start", ["sigmap", "linear", "rank", "global-rank"])
def test_a_low_temperature_is_surer(start: str) -> None:
    scores, budget = some_saliency(SPACE.n), budget_of(SPACE, 0.5, "per-family")
    hot, normal, cold = (starting_theta(scores, SPACE, budget, start, t) for t in (10.0, 1.0, 0.05))
    assert entropy(cold) < entropy(normal) < entropy(hot)


@pytest.mark.parametrize("start", ["sigmap", "linear", "rank"])
def test_the_scale_of_a_layers_saliency_does_not_matter(start: str) -> None:
    budget = budget_of(SPACE, 0.5, "per-family")
    scores = some_saliency(SPACE.n)
    scaled = scores.clone()
    SPACE.per_layer(scaled, "ffn")[1].mul_(1e4)
    torch.testing.assert_close(
        starting_theta(scores, SPACE, budget, start, 1.0), starting_theta(scaled, SPACE, budget, start, 1.0)
    )


@pytest.mark.parametrize("start", ["sigmap", "linear", "rank", "global-rank"])
def test_a_family_of_one_unit_a_layer_is_compared_across_the_layers(start: str) -> None:
    space = MaskSpace((Family("layer", (1, 1, 1, 1), (5, 5, 5, 5)),))
    scores = torch.tensor([3.0, 1.0, 4.0, 2.0], dtype=torch.float64)
    theta = starting_theta(scores, space, budget_of(space, 0.5, "global"), start, 1.0)
    assert theta.argsort().tolist() == [1, 3, 0, 2]
    assert (theta.sort().values.diff() > 0.01).all()


@pytest.mark.parametrize("start", ["sigmap", "linear", "rank", "global-rank"])
def test_equal_saliency_starts_at_the_keep_fraction_everywhere(start: str) -> None:
    theta = starting_theta(torch.ones(SPACE.n), SPACE, budget_of(SPACE, 0.3, "per-family"), start, 1.0)
    torch.testing.assert_close(theta, torch.full((SPACE.n,), 0.7, dtype=torch.float64))


@pytest.mark.parametrize("start", ["sigmap", "linear", "rank", "global-rank"])
def test_a_layer_without_units_is_no_obstacle(start: str) -> None:
    space = MaskSpace((Family("ffn", (3, 0, 2), (2, 2, 2)),))
    theta = starting_theta(some_saliency(5), space, budget_of(space, 0.5, "global"), start, 1.0)
    assert float(theta.sum()) == pytest.approx(2.5)


def test_rank_start_keeps_the_same_fraction_of_every_layer() -> None:
    space = MaskSpace((Family("attention", (3, 3), (40, 40)), Family("ffn", (30, 30), (3, 3))))
    scores = some_saliency(space.n) * torch.cat(
        [torch.tensor([1.0, 1e3])[pair % 2].expand(c) for pair, c in enumerate(space.pair_counts.tolist())]
    )
    budget = budget_of(space, 0.4, "global")
    mask = hard_mask(starting_theta(scores, space, budget, "rank", 1.0), space, budget)
    widths = space.widths(mask)
    assert widths["attention"] == [2, 2]
    assert max(widths["ffn"]) - min(widths["ffn"]) <= 1
    for name in widths:
        for values, kept in zip(space.per_layer(scores, name), space.per_layer(mask, name), strict=True):
            assert values[kept].min() > values[~kept].max()


def test_global_rank_start_keeps_the_highest_scores_of_all_layers_and_families() -> None:
    space = MaskSpace((Family("attention", (4, 4), (3, 3)), Family("ffn", (20, 20), (3, 3))))
    scores = some_saliency(space.n, seed=3)
    budget = budget_of(space, 0.4, "global")
    mask = hard_mask(starting_theta(scores, space, budget, "global-rank", 1.0), space, budget)
    assert scores[mask].min() > scores[~mask].max()
