"""First-order Taylor scores, compared with gradients of mask variables and with finite differences."""

import pytest
import torch
from helpers.models import VOCABULARY, tiny_model
from torch import Tensor, nn
from torch.func import functional_call

from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.scores.metrics import score

HEAD, CHANNELS, KV_HEADS = 8, 24, 4


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


def rows_of_unit(layer: nn.Module, block: str, unit: int) -> dict[str, tuple[int, list[int]]]:
    """Return, by projection, the axis and the indices that belong to a unit."""
    if block == "ffn":
        return {f"mlp.{name}_proj": (int(name == "down"), [unit]) for name in ("gate", "up", "down")}
    width = layer.self_attn.q_proj.out_features // KV_HEADS
    query_rows = list(range(unit * width, (unit + 1) * width))
    kv_rows = list(range(unit * HEAD, (unit + 1) * HEAD))
    return {
        "self_attn.q_proj": (0, query_rows),
        "self_attn.k_proj": (0, kv_rows),
        "self_attn.v_proj": (0, kv_rows),
        "self_attn.o_proj": (1, query_rows),
    }


def test_taylor_equals_the_gradient_of_a_mask_on_every_weight(architecture: str) -> None:
    """With L(W ∘ m), ∂L/∂m at m = 1 is W · ∂L/∂W, the first-order change when a weight is removed."""
    model, batches = tiny_model(architecture).double(), calibration()
    scores = score(PrunableModel.of(model), "taylor", batches, seed=0)
    names = [name for name, p in model.named_parameters() if "_proj.weight" in name]
    masks = {name: torch.ones_like(model.get_parameter(name), requires_grad=True) for name in names}
    mean_loss(model, batches, {name: model.get_parameter(name) * mask for name, mask in masks.items()}).backward()
    for index, layer in enumerate(model.model.layers):
        for block, units in (("attention", KV_HEADS), ("ffn", CHANNELS)):
            for unit in range(units):
                expected = 0.0
                for name, (axis, indices) in rows_of_unit(layer, block, unit).items():
                    change = masks[f"model.layers.{index}.{name}.weight"].grad
                    for place in indices:
                        expected += float(change.select(axis, place).abs().sum())
                assert float(scores[f"layers.{index}.{block}"][unit]) == pytest.approx(expected, rel=1e-6)


def test_taylor_equals_finite_differences() -> None:
    model, batches = tiny_model("llama-gqa").double(), calibration()[1:]
    unit_score = float(score(PrunableModel.of(model), "taylor", batches, seed=0)["layers.2.ffn"][5])
    layer, step, expected = (
        model.model.layers[2],
        1e-2,
        0.0,
    )  # the norms compute in float32
    with torch.no_grad():
        for name, (axis, [place]) in rows_of_unit(layer, "ffn", 5).items():
            weight = layer.get_submodule(name).weight
            for element in weight.select(axis, place):  # a view of one element
                original = element.clone()
                losses = []
                for sign in (1, -1):
                    element.copy_(original * (1 + sign * step))
                    losses.append(float(mean_loss(model, batches, {})))
                element.copy_(original)
                expected += abs(losses[0] - losses[1]) / (2 * step)
    assert unit_score == pytest.approx(expected, rel=1e-4)
