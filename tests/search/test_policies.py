"""Both policies through the search's eyes: masks within the budget, repaired for the units that they keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import pytest
import torch
from helpers.blocks import columns_in_order, output_linear
from helpers.grids import is_regular
from helpers.models import VOCABULARY, tiny_model
from helpers.units import chain_units, group_units, ranks_of
from torch import Tensor, nn

from pgprune_cli.core.grid import element_order
from pgprune_cli.core.policy import starting_theta
from pgprune_cli.core.space import Budget, MaskSpace, budget_of
from pgprune_cli.core.widths import LEAST_SPREAD, SPREAD
from pgprune_cli.forward.moments import observe_moments
from pgprune_cli.forward.shards import start_sharded
from pgprune_cli.model.masks import ModelMask
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.repair.least_squares import repaired_output
from pgprune_cli.repair.width_table import NO_MULTIPLES, WidthTable, solve_layers, width_step
from pgprune_cli.scores.metrics import score
from pgprune_cli.search.policies import Policy, UnitPolicy, WidthPolicy

CHANNELS, LAYERS = 24, 4
FAMILIES = ("attention", "ffn")
SCOPES = ("global", "per-family")
DAMPING = 1e-3


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, shape, generator=generator) for shape in ((2, 40), (3, 20))]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_model("llama-biased")


@cache
def obs_scores(model: nn.Module) -> dict[str, Tensor]:
    """Return the scores of a width search, computed once for a model."""
    return score(PrunableModel.of(model), "obs", batches(), 0)


def layer_policy(
    model: nn.Module,
    sparsity: float = 0.4,
    scope: str = "global",
    solve: bool = True,
    multiples: Mapping[str, int] = NO_MULTIPLES,
) -> WidthPolicy:
    prunable = PrunableModel.of(model)
    scores = obs_scores(model)
    space, units = chain_units(prunable.shape, scores=scores, metric="obs")
    ranks = ranks_of(prunable.shape, units, scores, "obs")
    solved = solve_layers(prunable, ranks, units, batches(), DAMPING, solve=solve, multiples=multiples)
    table = WidthTable.of(prunable, dict(solved))
    return WidthPolicy(table, table.priorities(space), space, budget_of(space, sparsity, scope, 0.0, multiples))


def unit_policy(model: nn.Module, sparsity: float = 0.4, scope: str = "global") -> UnitPolicy:
    space, _ = group_units(PrunableModel.of(model).shape)
    budget = budget_of(space, sparsity, scope)
    scores = torch.rand(space.n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta = starting_theta(scores, space, budget, "sigmap", 0.5)
    return UnitPolicy(theta, space, budget, "rloo", 0.05, "cosine", 10)


def model_mask_of(policy: Policy, model: nn.Module, mask: Tensor) -> ModelMask:
    """Return a mask over the policy's units as the masks of every layer."""
    prunable = PrunableModel.of(model)
    shape = prunable.shape
    if isinstance(policy, WidthPolicy):
        _, units = chain_units(shape, scores=obs_scores(model), metric="obs")
    else:
        _, units = group_units(shape)
    return shape.model_mask(policy.space, mask, units)


POLICIES = {"units": unit_policy, "widths": layer_policy}


def searched(policy: Policy, seed: int, steps: int = 5):
    """The state after some steps on a loss that is linear in the mask, and every mask on the way."""
    value = torch.randn(policy.space.n, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    state, masks = policy.begin(seed), []
    for _ in range(steps):
        state, draws, drawn = policy.propose(state, 4)
        masks.append(drawn)
        state = policy.update(state, draws, -(drawn.double() @ value))
    return state, torch.cat(masks)


def decided(policy: Policy, state) -> Tensor:
    """The mask that would be written."""
    return policy.final_mask(policy.centre(state))


def rooms(mask: Tensor, space: MaskSpace, budget: Budget) -> list[tuple[int, int]]:
    """Of every constraint the cost that is left, and that of the cheapest unit that could be kept next.

    In a layer whose units cost the same, any unit could. The steps of a chain have an order: the first removed one.
    """
    actual = []
    for constraint in budget:
        kept, costs = mask[constraint.units], space.costs[constraint.units]
        pairs = space.pair_of[constraint.units]
        following = [int(costs[(pairs == pair) & ~kept][0]) for pair in pairs.unique() if not kept[pairs == pair].all()]
        actual.append((constraint.kept - int(costs[kept].sum()), min(following, default=1 << 60)))
    return actual


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("build", POLICIES.values(), ids=POLICIES)
def test_the_decision_spends_the_budget_to_the_last_unit(
    build: Callable[..., UnitPolicy | WidthPolicy], sparsity: float, scope: str, model: nn.Module
) -> None:
    policy = build(model, sparsity, scope)
    state, _ = searched(policy, 0)
    assert all(0 <= room < cheapest for room, cheapest in rooms(decided(policy, state), policy.space, policy.budget))
    assert all(room >= 0 for room, _ in rooms(policy.mask(policy.centre(state)), policy.space, policy.budget))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_every_sample_of_the_layers_policy_is_within_the_budget(sparsity: float, scope: str, model: nn.Module) -> None:
    policy = layer_policy(model, sparsity, scope)
    _, masks = searched(policy, 1)
    assert (masks.shape, masks.dtype) == ((20, policy.space.n), torch.bool)
    for mask in masks:
        assert all(room >= 0 for room, _ in rooms(mask, policy.space, policy.budget))
        for part in policy.space.per_layer(mask, "ffn"):
            assert int(part.sum()) % width_step(CHANNELS) == 0
    if sparsity in (0.2, 0.5):
        assert len({tuple(mask.tolist()) for mask in masks}) > 5


def test_samples_of_the_units_policy_meet_the_budget_on_average(model: nn.Module) -> None:
    """Independent units cannot each time: only the expected cost is the budget's."""
    policy = unit_policy(model)
    _, _, masks = policy.propose(policy.begin(0), 2000)
    (constraint,) = policy.budget
    spent = (masks.double() @ policy.space.costs.double()).mean()
    assert float(spent) == pytest.approx(constraint.kept, rel=0.02)


def test_what_the_layers_policy_hears_of_a_sample_is_what_its_widths_lose(model: nn.Module) -> None:
    """Its draws are the errors of the masks, pair by pair, and the state keeps them with the losses."""
    policy = layer_policy(model)
    state, draws, masks = policy.propose(policy.begin(2), 4)
    for draw, mask in zip(draws.tolist(), masks, strict=True):
        widths = policy.space.widths(mask)
        expected = [policy.table.errors[i, name][widths[name][i]] for name in FAMILIES for i in range(LAYERS)]
        assert draw == [float(error) for error in expected]
    moved = policy.update(state, draws, torch.arange(4.0))
    assert torch.equal(moved.errors, draws)
    assert moved.losses.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_the_layers_policy_gives_more_to_a_layer_that_the_loss_feels(model: nn.Module) -> None:
    """Losses that are five times the error of one layer's FFN, and of all others once."""
    policy = layer_policy(model, 0.5)
    state = policy.begin(0)
    before, worth = decided(policy, state), torch.ones(2 * LAYERS, dtype=torch.float64)
    worth[LAYERS + 2] = 5.0
    entropies = [policy.entropy(state)]
    for _ in range(15):
        state, draws, _ = policy.propose(state, 6)
        state = policy.update(state, draws, draws @ worth)
        entropies.append(policy.entropy(state))
    of_layer = [int(policy.space.per_layer(mask, "ffn")[2].sum()) for mask in (before, decided(policy, state))]
    assert of_layer[1] > of_layer[0]
    assert int(state.mean.argmax()) == LAYERS + 2
    assert ((state.spread >= LEAST_SPREAD) & (state.spread <= SPREAD)).all()
    normals = torch.distributions.Normal(torch.zeros(2 * LAYERS, dtype=torch.float64), state.spread)
    assert entropies[-1] == pytest.approx(float(normals.entropy().sum()))
    assert entropies[-1] < entropies[0]


@pytest.mark.parametrize("build", POLICIES.values(), ids=POLICIES)
def test_the_same_seed_gives_the_same_search(build: Callable[..., UnitPolicy | WidthPolicy], model: nn.Module) -> None:
    left, masks = searched(build(model), 3)
    right, again = searched(build(model), 3)
    assert torch.equal(masks, again)
    assert torch.equal(decided(build(model), left), decided(build(model), right))
    assert not torch.equal(searched(build(model), 4)[1], masks)
    policy = build(model)
    assert policy.entropy(left) == policy.entropy(right)
    assert (policy.rate(left) is None) == isinstance(policy, WidthPolicy)


def test_every_sample_is_repaired_for_the_very_units_it_keeps(model: nn.Module) -> None:
    policy, shape = layer_policy(model), PrunableModel.of(model).shape
    run, moments = start_sharded(PrunableModel.of(model), batches()), {}
    for index in range(LAYERS):
        for name in FAMILIES:
            moments[index, name] = observe_moments(run, index, shape.family, shape.blocks[index][name])
        run.advance(index)
    _, partitions = chain_units(shape, scores=obs_scores(model), metric="obs")
    _, masks = searched(policy, 0)
    for mask in masks[::4]:
        keep = model_mask_of(policy, model, mask)
        repaired = policy.repaired(keep)
        partly = {(i, n) for i in range(LAYERS) for n in FAMILIES if 0 < keep[i].of(n).float().mean() < 1}
        assert repaired.keys() == partly
        for (index, name), output in repaired.items():
            stays, linear = keep[index].of(name), output_linear(model, index, name)
            assert is_regular(shape.grids[name][index], stays)
            order = element_order(partitions[index, name], policy.orders[index, name], shape.grids[name][index])
            columns = columns_in_order(order, stays, linear.in_features)
            expected = repaired_output(
                linear.weight, linear.bias, moments[index, name], columns, DAMPING, with_bias=False
            )
            assert output.weight.shape == (32, len(columns))
            torch.testing.assert_close(output.weight, expected.weight, rtol=1e-3, atol=1e-3)
            assert torch.equal(output.bias, linear.bias)


def test_nothing_is_repaired_where_nothing_was_solved(model: nn.Module) -> None:
    width_policy, units = layer_policy(model, solve=False), unit_policy(model)
    for policy in (width_policy, units):
        state, _ = searched(policy, 0)
        assert policy.repaired(model_mask_of(policy, model, policy.mask(policy.centre(state)))) == {}


def test_samples_keep_to_the_multiple_that_the_budget_asks_for(model: nn.Module) -> None:
    """Of 24 channels, widths by fives (or all): the samples' own grid, by twos, would not keep to it."""
    policy = layer_policy(model, multiples={"ffn": 5})
    state, masks = searched(policy, 0)
    space = policy.space
    widths = {int(part.sum()) for mask in [*masks, decided(policy, state)] for part in space.per_layer(mask, "ffn")}
    assert widths <= {0, 5, 10, 15, 20, 24}
    assert len(widths) > 2
    for mask in masks:
        keep = model_mask_of(policy, model, mask)
        for (index, name), output in policy.repaired(keep).items():
            assert output.weight.shape[1] == int(keep[index].of(name).sum()) * (1 if name == "ffn" else 8)


def test_query_heads_are_removed_by_a_width_search_and_kv_heads_by_a_unit_search(model: nn.Module) -> None:
    sizes = {"units": set(), "widths": set()}
    for name, build in POLICIES.items():
        policy = build(model, 0.5)
        state, masks = searched(policy, 0)
        for mask in [*masks, policy.mask(policy.centre(state)), decided(policy, state)]:
            for layer in PrunableModel.of(model).shape.kept(model_mask_of(policy, model, mask)):
                sizes[name].add(layer["attention"])
    assert {members for _, members in sizes["units"]} <= {0, 2}
    assert {members for _, members in sizes["widths"]} == {0, 1, 2} or {m for _, m in sizes["widths"]} == {1, 2}
