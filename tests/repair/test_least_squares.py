"""Repair against least squares on explicit tokens, one projection at a time and behind the pruned layers."""

from __future__ import annotations

import weakref

import pytest
import torch
from helpers.blocks import (
    BLOCKS,
    batches,
    columns_of,
    error_root_of,
    mask_of_first,
    model_unchanged,
    moments_by_hand,
    observed_inputs,
    output_linear,
    weighted_error,
)
from helpers.masks import dense_mask, draw, is_refused, same_masks
from helpers.models import tiny_model
from torch import Tensor, nn

from pgprune_cli.errors import RunError
from pgprune_cli.forward.curvature import error_roots
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.forward.moments import Moments, observe_moments
from pgprune_cli.model.masks import LayerMask, ModelMask, RepairedBlocks
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.repair import least_squares
from pgprune_cli.repair.least_squares import compensated_output, repair, repaired_output
from pgprune_cli.scores.obs import chain_errors, removal_order

DAMPING = 1e-6


COUNTS = [((2, 1), 11), (4, 13), (0, 9), ((1, 1), 0)]
REPAIRED = [(0, "attention"), (0, "ffn"), (1, "ffn"), (2, "ffn"), (3, "attention")]
"""Blocks with a part of their elements. Layer 1 keeps its attention; layers 2 and 3 have no attention, no FFN."""


def some_mask(model: nn.Module) -> ModelMask:
    return draw(model, COUNTS, seed=1)


def repaired_blocks(model: nn.Module, model_mask: ModelMask) -> list[tuple[int, str]]:
    """Return the blocks that lose some of their elements, but not all."""
    partly = [key for key in BLOCKS if 0 < float(model_mask[key[0]].of(key[1]).float().mean()) < 1]
    assert partly == REPAIRED or any(is_refused(model, name) for name in ("attention", "ffn"))
    return partly


# --- one projection


def problem(seed: int, inputs: int = 12, hidden: int = 7, tokens: int = 40) -> tuple[Tensor, Tensor, Tensor, Moments]:
    """A weight, tokens whose inputs are correlated and not centred, their weights, and the moments of these."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(hidden, inputs, generator=generator, dtype=torch.float64)
    mixed = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mixed + mixed[0]
    share = torch.rand(tokens, generator=generator, dtype=torch.float64) + 0.01
    share = share / share.sum()
    return weight, x, share, Moments((x * share[:, None]).T @ x, share @ x, torch.ones(()))


COLUMNS = [[0, 3, 4, 9], [11], list(range(12)), [1, 2, 5, 6, 7, 8, 10]]


@pytest.mark.parametrize("columns", COLUMNS, ids=len)
@pytest.mark.parametrize("damping", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_repaired_output_is_the_least_squares_solution(columns: list[int], damping: float, with_bias: bool) -> None:
    weight, x, share, moments = problem(len(columns))
    kept, rows = torch.tensor(columns), share.sqrt()[:, None]
    mean = share @ x if with_bias else torch.zeros(12, dtype=torch.float64)
    ridge = damping * float((share[:, None] * (x - mean).square()).sum(0).mean())
    left = torch.cat([rows * x[:, kept], ridge**0.5 * torch.eye(len(kept), dtype=torch.float64)])
    right = torch.cat([rows * (x @ weight.T), ridge**0.5 * weight[:, kept].T])
    if with_bias:
        left = torch.cat([left, torch.cat([rows, rows.new_zeros(len(kept), 1)])], dim=1)
    expected = torch.linalg.lstsq(left, right).solution.T
    bias = torch.arange(7, dtype=torch.float64)
    for own in (None, bias):
        got = repaired_output(weight, own, moments, kept, damping, with_bias=with_bias)
        torch.testing.assert_close(got.weight, expected[:, : len(kept)], rtol=1e-7, atol=1e-7)
        if with_bias:
            target = expected[:, -1] + (0.0 if own is None else own)
            torch.testing.assert_close(got.bias, target, rtol=1e-7, atol=1e-7)
        else:
            assert got.bias is own


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_repair_keeps_weights_that_nothing_excites(with_bias: bool) -> None:
    """A channel that is always silent, and one that no other can stand for: both stay as they are."""
    weight, x, share, _ = problem(0)
    x[:, 2] = 0.0
    moments = Moments((x * share[:, None]).T @ x, share @ x, torch.ones(()))
    everything = torch.arange(12)
    got = repaired_output(weight, None, moments, everything, 1e-3, with_bias=with_bias)
    torch.testing.assert_close(got.weight, weight)
    got = repaired_output(weight, None, moments, everything[:4], 1e-3, with_bias=with_bias)
    torch.testing.assert_close(got.weight[:, 2], weight[:, 2])


def test_moments_that_are_a_little_indefinite_still_give_a_repair() -> None:
    weight, x, share, _ = problem(0, tokens=3)
    second = ((x * share[:, None]).T @ x).float().double() - 1e-6 * torch.eye(12, dtype=torch.float64)
    got = repaired_output(
        weight.float(), None, Moments(second, share @ x, torch.ones(())), torch.arange(8), 0.0, with_bias=False
    )
    assert got.weight.dtype == torch.float32
    assert got.weight.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_refused(bad: float) -> None:
    """However great the ridge, they never become positive definite."""
    weight, _, _, moments = problem(0)
    moments.second[2, 2] = bad
    with pytest.raises(RunError, match="not finite"):
        repaired_output(weight, None, moments, torch.arange(4), 1e-3, with_bias=False)


@pytest.mark.parametrize("columns", COLUMNS, ids=len)
def test_a_compensated_output_adds_the_mean_of_what_is_gone(columns: list[int]) -> None:
    weight, x, share, moments = problem(3)
    constant = [0.0] * 7
    for row in range(7):
        for column in range(12):
            if column not in columns:
                mean = sum(float(share[token] * x[token, column]) for token in range(len(x)))
                constant[row] += float(weight[row, column]) * mean
    bias = torch.arange(7, dtype=torch.float64)
    for own in (None, bias):
        got = compensated_output(weight, own, moments, torch.tensor(columns))
        assert torch.equal(got.weight, weight[:, columns])
        expected = torch.tensor(constant, dtype=torch.float64) + (0.0 if own is None else own)
        torch.testing.assert_close(got.bias, expected)


# --- a model


def stream(
    model: nn.Module, method: str, keep: ModelMask, repaired: RepairedBlocks, index: int, name: str
) -> tuple[Tensor, Tensor]:
    """`seen` where the method observes a block: `bias` in the dense model, the others behind the pruned layers."""
    if method == "bias":
        return behind(model, dense_mask(model), {}, index, name)
    return behind(model, keep, repaired, index, name)


def behind(model: nn.Module, keep: ModelMask, repaired: RepairedBlocks, index: int, name: str) -> tuple[Tensor, Tensor]:
    """`seen` where everything in front of this block is pruned and repaired, and the block and what follows is not."""
    before = BLOCKS[: BLOCKS.index((index, name))]
    front = tuple(
        LayerMask(
            kept.attention if (place, "attention") in before else dense.attention,
            kept.ffn if (place, "ffn") in before else dense.ffn,
        )
        for place, (kept, dense) in enumerate(zip(keep, dense_mask(model), strict=True))
    )
    prunable = PrunableModel.of(model)
    with Evaluator(prunable).shrunk(front, {key: output for key, output in repaired.items() if key in before}):
        return observed_inputs(prunable, index, name)


@pytest.mark.parametrize("reselect", [False, True])
@pytest.mark.parametrize("method", ["least-squares", "least-squares-bias", "bias"])
def test_no_block_is_worse_for_its_repair_on_the_text(architecture: str, method: str, reselect: bool) -> None:
    model = tiny_model(architecture)
    with model_unchanged(model):
        before = some_mask(model)
        keep, repaired = repair(PrunableModel.of(model), before, batches(), method, DAMPING, reselect=reselect)
    assert reselect or same_masks(keep, before)
    assert sorted(repaired) == repaired_blocks(model, before)  # nothing for whole and for empty blocks
    for (index, name), output in repaired.items():
        linear, mask = output_linear(model, index, name), keep[index].of(name)
        columns = columns_of(mask, linear.in_features)
        assert output.weight.shape == (32, len(columns))
        assert output.weight.dtype == torch.float32
        x, weights = stream(model, method, keep, repaired, index, name)
        own = 0.0 if linear.bias is None else linear.bias.double()
        expected = x @ linear.weight.double().T + own
        unrepaired = x[:, columns] @ linear.weight[:, columns].double().T + own
        bias = 0.0 if output.bias is None else output.bias.double()
        refitted = x[:, columns] @ output.weight.double().T + bias
        before, after = weighted_error(expected, unrepaired, weights), weighted_error(expected, refitted, weights)
        assert after <= before
        if method == "bias":
            mean = compensated_output(linear.weight.double(), linear.bias, moments_by_hand(x, weights), columns)
            torch.testing.assert_close(output.bias.double(), mean.bias, rtol=1e-4, atol=1e-5)
        if method.startswith("least-squares"):
            moments = moments_by_hand(x, weights)
            best = repaired_output(
                linear.weight.double(), None, moments, columns, DAMPING, with_bias=method.endswith("bias")
            )
            ideal = x[:, columns] @ best.weight.T + (own if best.bias is None else best.bias + own)
            assert after == pytest.approx(weighted_error(expected, ideal, weights), rel=1e-3)
            assert after < 0.99 * before


@pytest.mark.parametrize("reselect", [False, True])
def test_a_model_that_loses_nothing_is_not_repaired(architecture: str, reselect: bool) -> None:
    model = tiny_model(architecture)
    with model_unchanged(model):
        keep, repaired = repair(
            PrunableModel.of(model), dense_mask(model), batches()[:1], "least-squares", DAMPING, reselect=reselect
        )
    assert repaired == {}
    assert same_masks(keep, dense_mask(model))


@pytest.mark.parametrize("method", ["least-squares", "bias"])
def test_units_that_are_chosen_again_are_those_that_obs_keeps_behind_the_pruned_layers(
    architecture: str, method: str
) -> None:
    """As many as before in every block; and by the loss's directions a line loses no more than before."""
    model = tiny_model(architecture)
    prunable, masks = PrunableModel.of(model), some_mask(model)
    keep, repaired = repair(prunable, masks, batches(), method, DAMPING, reselect=True)
    roots = error_roots(prunable, batches())
    changed = 0
    for index, name in BLOCKS:
        mask, before = keep[index].of(name), masks[index].of(name)
        grid, cost = prunable.shape.grids[name][index], prunable.shape.parameters[name][index]
        assert (mask.dtype, mask.shape, grid.kept(mask)) == (torch.bool, before.shape, grid.kept(before))
        if (index, name) not in repaired_blocks(model, masks):
            assert torch.equal(mask, before)
            continue
        linear = output_linear(model, index, name)
        x, weights = stream(model, method, keep, repaired, index, name)
        moments = moments_by_hand(x, weights)
        felt = error_root_of(model, index, name, roots[index]) @ linear.weight.double()
        if grid.is_line:
            order, _ = removal_order(felt, moments.second, len(mask))
            assert torch.equal(mask, mask_of_first(order.flip(0), int(mask.sum())))
        else:
            errors = chain_errors(felt, moments.second, grid, cost, grid.kept(before))
            assert torch.equal(mask, errors.isinf())
        losses = []
        for decision in (mask, before):
            columns = columns_of(decision, linear.in_features)
            best = repaired_output(felt, None, moments, columns, 1e-2, with_bias=False).weight
            losses.append(weighted_error(x @ felt.T, x[:, columns] @ best.T, weights))
        assert losses[0] <= losses[1] * (1 + 1e-6) or not grid.is_line
        changed += not torch.equal(mask, before)
    assert changed >= 3


def test_chosen_again_from_the_same_text_nothing_changes() -> None:
    model = tiny_model("qwen3")
    once = repair(PrunableModel.of(model), some_mask(model), batches(), "least-squares", DAMPING, reselect=True)
    twice = repair(PrunableModel.of(model), once.model_mask, batches(), "least-squares", DAMPING, reselect=True)
    assert same_masks(once.model_mask, twice.model_mask)
    assert all(torch.equal(once.blocks[key].weight, twice.blocks[key].weight) for key in REPAIRED)


@pytest.mark.parametrize("place", ["0.self_attn.o_proj", "1.mlp.down_proj", "2.mlp.act_fn", "3.self_attn"])
@pytest.mark.parametrize("call", [0, 5])
def test_a_forward_that_fails_leaves_the_model_as_it_was(place: str, call: int) -> None:
    """At its first call a layer is observed, and at its sixth something of it is pruned already."""
    model, calls = tiny_model("llama-biased"), []

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) > call:
            raise RuntimeError("out of memory")

    module = model.model.layers.get_submodule(place)
    handle = module.register_forward_pre_hook(fail)
    with model_unchanged(model):
        if place == "3.self_attn" and call == 5:
            call = 3  # the last layer is observed once a batch, and its FFN is not pruned
        with pytest.raises(RuntimeError, match="out of memory"):
            repair(PrunableModel.of(model), some_mask(model), batches(), "least-squares-bias", DAMPING)
        handle.remove()


def test_one_blocks_moments_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref] = []

    def observed(*arguments: object) -> Moments:
        assert not any(reference() for reference in alive)
        moments = observe(*arguments)
        alive.append(weakref.ref(moments))
        return moments

    observe = observe_moments
    monkeypatch.setattr(least_squares, "observe_moments", observed)
    model = tiny_model("qwen3")
    repair(PrunableModel.of(model), some_mask(model), batches(), "least-squares", DAMPING)
    assert len(alive) == len(REPAIRED)
