"""The fit of the last layers: closer to the dense model's predictions, on gradients that plain autograd confirms."""

from __future__ import annotations

import pytest
import torch
from helpers.blocks import model_unchanged
from helpers.fits import windows
from helpers.masks import draw, masked, repaired_by_hand
from helpers.models import EXPERT_ARCHITECTURES, tiny_model
from torch import Tensor, nn

from pgprune_cli.forward.divergence import Divergence
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.model.masks import ModelMask
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.repair import last_layers as fits
from pgprune_cli.repair import training
from pgprune_cli.repair.last_layers import fitted_layers, last_layers_batches
from pgprune_cli.repair.least_squares import Repaired, repair

DAMPING = 1e-3

COUNTS = [((2, 1), 11), (4, 13), (3, 9), ((2, 1), 6)]


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Several steps of four windows each, whose logits exist in parts."""
    monkeypatch.setattr(training, "TOKENS_PER_STEP", 80)
    monkeypatch.setattr(fits, "LEARNING_RATE", 1e-2)
    monkeypatch.setattr(fits, "ROWS", 7)


def refit(model: nn.Module, mask: ModelMask, text: list[Tensor], last_layers: int) -> Repaired:
    """Repair all blocks of a model, which must be unchanged afterwards."""
    with model_unchanged(model):
        return repair(PrunableModel.of(model), mask, text, "sublayer", DAMPING, epochs=1, last_layers=last_layers)


def divergence(model: nn.Module, repaired: Repaired, tokens: Tensor) -> float:
    """Return the divergence of the pruned model from the dense one, in nats per token."""
    measured = Divergence(Evaluator(PrunableModel.of(model)))
    dense = measured.dense_states(tokens)
    return float(measured.values([repaired.model_mask], tokens, [repaired.blocks], dense).objective)


@pytest.mark.parametrize("last_layers", [1, 3])
def test_only_the_last_layers_change_and_predict_more_like_the_dense_model(architecture: str, last_layers: int) -> None:
    model, text = tiny_model(architecture), windows(64)
    mask = draw(model, COUNTS, seed=1)
    before, after = refit(model, mask, text, last_layers=0), refit(model, mask, text, last_layers)
    assert sorted(after.blocks) == sorted(before.blocks)
    for (index, name), own in after.blocks.items():
        same = before.blocks[index, name]
        if index < len(mask) - last_layers:
            assert torch.equal(own.weight, same.weight)
            assert all(torch.equal(value, same.inner[key]) for key, value in own.inner.items())
        else:
            assert own.weight.dtype == same.weight.dtype
            assert own.weight.shape == same.weight.shape
            assert not own.weight.requires_grad
            assert not torch.equal(own.weight, same.weight)
    tokens = torch.cat(text)
    assert divergence(model, after, tokens) < divergence(model, before, tokens)


@pytest.mark.parametrize("architecture", EXPERT_ARCHITECTURES)
def test_layers_with_experts_stay_as_they_are(architecture: str) -> None:
    model, text = tiny_model(architecture), windows(32)
    mask = draw(model, [((2, 1), 12)] * 4, seed=1)
    before, after = refit(model, mask, text, last_layers=0), refit(model, mask, text, last_layers=2)
    assert all(torch.equal(own.weight, before.blocks[key].weight) for key, own in after.blocks.items())


@pytest.mark.parametrize("last_layers", [1, 3])
def test_gradients_are_those_of_the_divergence(
    architecture: str, last_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is a dense copy with the removed elements' outputs zeroed, differentiated as a whole."""
    model, text = tiny_model(architecture), windows()
    mask = draw(model, COUNTS, seed=1)
    repaired = refit(model, mask, text, last_layers=0)
    seen: dict[str, Tensor] = {}

    def first_gradients(start, steps, rate, set_gradients):  # type: ignore[no-untyped-def]
        weights = {name: value.clone().requires_grad_() for name, value in start.items()}
        set_gradients(weights, torch.arange(4))
        seen.update({name: value.grad for name, value in weights.items()})
        return iter(())

    monkeypatch.setattr(fits, "trained", first_gradients)
    refit(model, mask, text, last_layers)

    prunable, copied = PrunableModel.of(model), repaired_by_hand(model, repaired.model_mask, repaired.blocks)
    layers, tokens = PrunableModel.of(copied).layers, text[0]
    outputs = {
        (index, block.name): layers[index].get_parameter(f"{block.output_path}.weight").requires_grad_()
        for index in range(len(mask) - last_layers, len(mask))
        for block in prunable.family.blocks_of(layers[index])
        if (index, block.name) in repaired.blocks
    }
    with torch.no_grad():
        reference = model(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
    with masked(copied, mask):
        log_probabilities = copied(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
        loss = (reference.exp() * (reference - log_probabilities)).sum(-1).mean()
        gradients = torch.autograd.grad(loss, list(outputs.values()))
    for (index, name), gradient in zip(outputs, gradients, strict=True):
        block = next(block for block in prunable.family.blocks_of(layers[index]) if block.name == name)
        kept = mask[index].of(name)
        own = gradient.unflatten(1, (len(kept), -1))[:, kept].flatten(1)
        fitted = seen[f"{index}.{block.module}.{block.output}.weight"]
        torch.testing.assert_close(fitted, own, rtol=1e-2, atol=1e-3 * float(own.abs().max()))


def test_a_fit_that_finds_nothing_better_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fits, "LEARNING_RATE", 1e3)
    model, text = tiny_model("llama-gqa"), windows()
    mask = draw(model, COUNTS, seed=1)
    before, after = refit(model, mask, text, last_layers=0), refit(model, mask, text, last_layers=2)
    assert all(torch.equal(own.weight, before.blocks[key].weight) for key, own in after.blocks.items())


@pytest.mark.parametrize("last", [((2, 1), 0), (0, 6), (0, 0)])
@pytest.mark.parametrize("others", [0, 1])
def test_removed_blocks_of_the_last_layers_stay_removed(last: tuple, others: int) -> None:
    model, text = tiny_model("qwen3"), windows(32)
    counts = [*COUNTS[:-1], last] if not others else [*COUNTS[:-2], last, COUNTS[-1]]
    mask = draw(model, counts, seed=1)
    before, after = refit(model, mask, text, last_layers=0), refit(model, mask, text, last_layers=1 + others)
    assert sorted(after.blocks) == sorted(before.blocks)
    tokens = torch.cat(text)
    assert divergence(model, after, tokens) <= divergence(model, before, tokens)


def test_one_window_cannot_be_set_aside_so_nothing_is_fitted() -> None:
    model, text = tiny_model("llama-gqa"), windows(1)
    mask = draw(model, COUNTS, seed=1)
    before, after = refit(model, mask, text, last_layers=0), refit(model, mask, text, last_layers=2)
    assert all(torch.equal(own.weight, before.blocks[key].weight) for key, own in after.blocks.items())


@pytest.mark.parametrize(("count", "fitted"), [(0, []), (1, [3]), (3, [1, 2, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])])
def test_which_layers_are_fitted(count: int, fitted: list[int]) -> None:
    assert list(fitted_layers(PrunableModel.of(tiny_model("llama-gqa")), count)) == fitted


@pytest.mark.parametrize("architecture", EXPERT_ARCHITECTURES)
def test_no_layer_before_one_with_experts_is_fitted(architecture: str) -> None:
    model = PrunableModel.of(tiny_model(architecture))
    grids = model.shape.grids["ffn"]
    dense = [index for index, grid in enumerate(grids) if not grid.separate]
    after = max((index for index, grid in enumerate(grids) if grid.separate), default=-1) + 1
    assert list(fitted_layers(model, 4)) == [index for index in dense if index >= after]


def test_text_is_limited_and_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [torch.zeros(4, 20) for _ in range(10)]
    assert last_layers_batches(batches) == list(range(10))
    monkeypatch.setattr(fits, "TOKENS", 400)
    assert last_layers_batches(batches) == [0, 2, 4, 6, 8]
    monkeypatch.setattr(fits, "TOKENS", 1)
    assert last_layers_batches(batches) == [0]
