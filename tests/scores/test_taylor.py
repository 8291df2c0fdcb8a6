"""First-order Taylor scores, compared with gradients of mask variables and with finite differences."""

from collections.abc import Iterator

import pytest
import torch
from helpers.models import VOCABULARY, tiny_model
from torch import Tensor, nn
from torch.func import functional_call

from pgprune_cli.core.grid import Grid
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.unit_tensors import UnitTensor
from pgprune_cli.scores.metrics import score


def calibration() -> list[Tensor]:
    """Return windows of different lengths, of which every prediction must count the same."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, shape, generator=generator) for shape in ((2, 20), (1, 9))]


def mean_loss(model: nn.Module, batches: list[Tensor], weights: dict[str, Tensor]) -> Tensor:
    """Return the mean loss over all predictions of all batches, with some weights replaced."""
    losses = []
    for tokens in batches:
        logits = functional_call(model, weights, (), {"input_ids": tokens}).logits
        for text, row in zip(tokens, logits, strict=True):
            losses += [-row[place].log_softmax(0)[text[place + 1]] for place in range(len(text) - 1)]
    return torch.stack(losses).mean()


def weights_of(model: nn.Module) -> Iterator[tuple[str, str, UnitTensor, Grid]]:
    """Yield the name of the scores, the name of the weight, what its rows are, and the grid, for every projection."""
    prunable = PrunableModel.of(model)
    for index, layer in enumerate(prunable.layers):
        for block in prunable.family.blocks_of(layer):
            for tensor in prunable.family.unit_tensors(layer, block):
                if tensor.key == "weight" and tensor.module in block.projections:
                    name = f"{prunable.family.layers}.{index}.{block.module}.{tensor.name}"
                    yield f"layers.{index}.{block.name}", name, tensor, prunable.shape.grids[block.name][index]


def test_taylor_equals_the_gradient_of_a_mask_on_every_weight(architecture: str) -> None:
    """With L(W ∘ m), ∂L/∂m at m = 1 is W · ∂L/∂W, the first-order change when a weight is removed.

    The query heads of a KV head share that of its keys and values equally.
    """
    model, batches = tiny_model(architecture).double(), calibration()
    scores = score(PrunableModel.of(model), "taylor", batches, seed=0)
    weights = list(weights_of(model))
    masks = {name: torch.ones_like(model.get_parameter(name), requires_grad=True) for _, name, _, _ in weights}
    mean_loss(model, batches, {name: model.get_parameter(name) * mask for name, mask in masks.items()}).backward()
    expected = {key: torch.zeros_like(values) for key, values in scores.items()}
    for key, name, tensor, grid in weights:
        by_row = masks[name].grad.abs().movedim(tensor.axis, 0).flatten(1).sum(1)
        start = 0
        for part in tensor.parts:
            shared_by = grid.elements // part.runs
            for element in range(grid.elements):
                run = start + element // shared_by * part.width
                expected[key][element] += float(by_row[run : run + part.width].sum()) / shared_by
            start += part.rows
    for key, values in scores.items():
        torch.testing.assert_close(values, expected[key], rtol=1e-6, atol=1e-12)


def test_taylor_equals_finite_differences() -> None:
    model, batches = tiny_model("llama-gqa").double(), calibration()[1:]
    unit_score = float(score(PrunableModel.of(model), "taylor", batches, seed=0)["layers.2.ffn"][5])
    layer, step, expected = (
        model.model.layers[2],
        1e-2,
        0.0,
    )  # the norms compute in float32
    with torch.no_grad():
        for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            weight = layer.mlp.get_submodule(name).weight
            for element in weight.select(axis, 5):  # a view of one element
                original = element.clone()
                losses = []
                for sign in (1, -1):
                    element.copy_(original * (1 + sign * step))
                    losses.append(float(mean_loss(model, batches, {})))
                element.copy_(original)
                expected += abs(losses[0] - losses[1]) / (2 * step)
    assert unit_score == pytest.approx(expected, rel=1e-4)
