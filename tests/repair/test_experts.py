"""Repair of experts: on its tokens no expert is worse for it, those with few tokens keep their weights."""

from __future__ import annotations

import pytest
import torch
from helpers.blocks import batches, model_unchanged
from helpers.experts import output_of, router_of
from helpers.masks import keep_first, random_elements
from helpers.models import EXPERT_ARCHITECTURES, tiny_model
from helpers.units import chain_units, ranks_of
from torch import Tensor, nn

from pgprune_cli.core.grid import element_order
from pgprune_cli.forward.expert_moments import ExpertMoments
from pgprune_cli.forward.moments import observe_moments
from pgprune_cli.forward.shards import start_sharded
from pgprune_cli.model.families.experts import ExpertsFamily
from pgprune_cli.model.masks import LayerMask
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.repair.equations import WidthProblem
from pgprune_cli.repair.experts import has_enough_tokens, repaired_experts, reselected_experts, solve_expert_widths
from pgprune_cli.repair.least_squares import repair

experts_only = pytest.mark.parametrize("architecture", EXPERT_ARCHITECTURES)
DAMPING = 1e-6


def moments_of(model: nn.Module) -> ExpertMoments:
    """Return the moments of the experts of layer 0."""
    prunable = PrunableModel.of(model)
    moments = observe_moments(start_sharded(prunable, batches()), 0, prunable.family, prunable.family.ffn)
    assert isinstance(moments, ExpertMoments)
    return moments


def error(weight: Tensor, dense: Tensor, columns: Tensor, second: Tensor) -> float:
    """Return the mean weighted squared error of an output projection on some columns."""
    change = dense.double().clone()
    change[:, columns] -= weight.double()
    return float((change @ second.double() * change).sum())


@experts_only
def test_no_expert_is_worse_for_its_repair_on_its_tokens(architecture: str) -> None:
    model = tiny_model(architecture)
    prunable, moments = PrunableModel.of(model), moments_of(model)
    layer, family, grid = prunable.layers[0], prunable.family, prunable.shape.grids["ffn"][0]
    assert isinstance(family, ExpertsFamily)
    mask = random_elements(grid, 5, 8, torch.Generator().manual_seed(0))
    output = repaired_experts(family, layer, mask, grid, moments, DAMPING)
    assert output.weight.shape == ((5, 8, 32) if architecture == "gpt_oss" else (5, 32, 8)) and output.bias is None
    kept = mask.view(8, 12)
    better = 0
    for row, expert in enumerate(kept.any(1).nonzero().flatten().tolist()):
        columns = kept[expert].nonzero().flatten()
        dense, _ = output_of(layer, expert)
        repaired = output.weight[row].T if architecture == "gpt_oss" else output.weight[row]
        before = error(dense[:, columns], dense, columns, moments.second[expert])
        after = error(repaired, dense, columns, moments.second[expert])
        assert after <= before * (1 + 1e-6)
        better += after < 0.99 * before
    assert better


@experts_only
def test_experts_with_too_few_tokens_keep_their_weights_and_are_named(architecture: str) -> None:
    model = tiny_model(architecture)
    router = router_of(model.model.layers[0])
    router.weight[3] = 0.0  # never among the two highest logits
    if getattr(router, "bias", None) is not None:
        router.bias[3] = -1e3
    else:
        router.weight[4] = -router.weight[5]  # one of the two is always positive, and so is another pair's
        router.weight[6] = -router.weight[7]
        router.weight[0] = -router.weight[1]
    model_mask = keep_first(model, [((4, 2), (8, 8))] + [((4, 2), (8, 12))] * 3)
    notes: list[str] = []
    with model_unchanged(model):
        _, repaired = repair(
            PrunableModel.of(model), model_mask, batches(), "least-squares", DAMPING, note=notes.append
        )
    assert set(repaired) == {(0, "ffn")}
    weight = repaired[0, "ffn"].weight[3]
    dense, _ = output_of(model.model.layers[0], 3)
    assert torch.equal(weight.T if architecture == "gpt_oss" else weight, dense[:, :8])
    assert len(notes) == 1 and notes[0].startswith("layer 0: ") and "3" in notes[0].rpartition(": ")[2]
    assert "of 8 experts" in notes[0]


@experts_only
def test_experts_that_keep_all_channels_are_not_repaired(architecture: str) -> None:
    model = tiny_model(architecture)
    model_mask = keep_first(model, [((4, 2), (3, 12))] * 4)
    kept, repaired = repair(PrunableModel.of(model), model_mask, batches(), "least-squares", DAMPING, reselect=True)
    assert repaired == {}
    assert all(PrunableModel.of(model).shape.grids["ffn"][0].kept(layer.ffn) == (3, 12) for layer in kept)


@experts_only
def test_reselected_experts_are_those_whose_removal_costs_most(architecture: str) -> None:
    model = tiny_model(architecture)
    prunable, moments = PrunableModel.of(model), moments_of(model)
    grid, layer = prunable.shape.grids["ffn"][0], prunable.layers[0]
    root = torch.eye(32, dtype=torch.float64)
    mask = keep_first(model, [((4, 2), (3, 12))] * 4)[0].ffn
    chosen = reselected_experts(prunable.family, layer, mask, grid, moments, root)
    assert grid.kept(chosen) == (3, 12)
    energies = []
    for expert in range(8):
        weight, bias = (part.double() for part in output_of(layer, expert))
        second, first, total = (part[expert].double() for part in (moments.second, moments.first, moments.weight))
        mixed = 2 * bias @ weight @ first + total * bias.square().sum()
        energies.append(float((weight @ second * weight).sum() + mixed))
    best = sorted(range(8), key=energies.__getitem__)[-3:]
    assert grid.kept_groups(chosen).nonzero().flatten().tolist() == sorted(best)


@experts_only
@pytest.mark.parametrize("solve", [True, False])
def test_widths_of_experts_have_the_errors_of_their_masks(architecture: str, solve: bool) -> None:
    model = tiny_model(architecture)
    prunable, moments = PrunableModel.of(model), moments_of(model)
    family, layer, grid = prunable.family, prunable.layers[0], prunable.shape.grids["ffn"][0]
    assert isinstance(family, ExpertsFamily)
    _, partitions = chain_units(prunable.shape)
    ranks = ranks_of(prunable.shape, partitions)
    partition, order = partitions[0, "ffn"], ranks[0, "ffn"].argsort(descending=True)
    widths, root = list(range(len(order) + 1)), torch.eye(32, dtype=torch.float64)
    errors, weights = solve_expert_widths(
        family, layer, moments, WidthProblem(order, partition, widths, root, DAMPING), solve=solve
    )
    assert (errors.diff() <= 1e-9).all() and float(errors[-1]) == pytest.approx(0.0, abs=1e-6)
    enough, elements = has_enough_tokens(moments), element_order(partition, order, grid)
    for width in widths[1:-1]:
        mask = order.argsort()[partition] < width
        groups, members = grid.kept(mask)
        assert (int(mask.sum()) in weights) == (solve and members < 12)
        output = repaired_experts(family, layer, mask, grid, moments, DAMPING)
        if int(mask.sum()) in weights:
            kept = elements[mask[elements]].view(groups, members)
            experts, channels = (kept[:, 0].argsort().argsort(), (kept % 12).argsort(1).argsort(1))
            axis = family._channel_axis - 1
            expected = [
                output.weight[expert].index_select(axis, own) for expert, own in zip(experts, channels, strict=True)
            ]
            torch.testing.assert_close(weights[int(mask.sum())], torch.stack(expected), rtol=1e-3, atol=1e-4)
        assert enough.any() and LayerMask(mask, mask).ffn.any() and groups >= 2
