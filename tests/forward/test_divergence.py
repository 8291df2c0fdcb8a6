"""The divergence from the dense model equals a plain computation on all logits, however it is split."""

import pytest
import torch
from helpers.masks import MODEL_MASKS, dense_mask, logits_of, random_repair, random_tokens
from helpers.masks import masked as silenced
from helpers.models import ARCHITECTURES, EXPERT_ARCHITECTURES, tiny_model
from torch import Tensor, nn

from pgprune_cli.forward import divergence as divergences
from pgprune_cli.forward.divergence import Divergence, Values
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.model.masks import ModelMask, RepairedBlocks
from pgprune_cli.model.prunable import PrunableModel

NAMES = ("random", "another random", "an empty layer")


def measured(
    model: nn.Module,
    model_masks: list[ModelMask],
    tokens: Tensor,
    weight: float = 0.0,
    repaired: list[RepairedBlocks] | None = None,
) -> Values:
    own = Divergence(Evaluator(PrunableModel.of(model)), weight)
    return own.values(model_masks, tokens, repaired or [{}] * len(model_masks), own.dense_states(tokens))


def stream_of(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """Return the residual stream behind the first, the middle and the last of four layers, in float64."""
    layers, states = PrunableModel.of(model).layers, []

    def record(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        states.append((output[0] if isinstance(output, tuple) else output).double())

    handles = [layers[index].register_forward_hook(record) for index in (0, 2, 3)]
    logits_of(model, tokens)
    for handle in handles:
        handle.remove()
    return states


def direct(model: nn.Module, model_mask: ModelMask, tokens: Tensor, weight: float) -> float:
    """Return the objective from all logits and states at once, in float64."""
    dense, dense_stream = logits_of(model, tokens).double()[:, :-1], stream_of(model, tokens)
    with silenced(model, model_mask):
        pruned, stream = logits_of(model, tokens).double()[:, :-1], stream_of(model, tokens)
    expected, got = dense.log_softmax(-1), pruned.log_softmax(-1)
    kl = (expected.exp() * (expected - got)).sum(-1).mean()
    errors = [
        ((own - reference).square().sum(-1) / reference.square().sum(-1)).mean()
        for own, reference in zip(stream, dense_stream, strict=True)
    ]
    return float(kl + weight * torch.stack(errors).mean())


@pytest.mark.parametrize("weight", [0.0, 1.0], ids=["kl", "kl-hidden"])
@pytest.mark.parametrize("architecture", (*ARCHITECTURES, *EXPERT_ARCHITECTURES))
def test_divergence_equals_a_plain_computation_on_all_logits(architecture: str, weight: float) -> None:
    model, tokens = tiny_model(architecture), random_tokens()
    model_masks = [MODEL_MASKS[name](model) for name in NAMES]
    got = measured(model, model_masks, tokens, weight)
    expected = [direct(model, model_mask, tokens, weight) for model_mask in model_masks]
    assert got.objective.dtype == torch.float64
    assert got.objective.tolist() == pytest.approx(expected, rel=1e-4)
    losses = Evaluator(PrunableModel.of(model)).losses(model_masks, tokens)
    torch.testing.assert_close(got.loss, losses, rtol=1e-5, atol=0)


@pytest.mark.parametrize("architecture", ["llama-gqa", "gemma2", "granite"])
def test_dense_model_does_not_diverge_from_itself(architecture: str) -> None:
    model = tiny_model(architecture)
    assert measured(model, [dense_mask(model)], random_tokens(), weight=1.0).objective.tolist() == [0.0]


def test_repaired_blocks_replace_those_of_the_model() -> None:
    model, tokens = tiny_model("llama-gqa"), random_tokens()
    model_masks = [MODEL_MASKS[name](model) for name in NAMES]
    repaired = [random_repair(model, model_mask, bias=True) for model_mask in model_masks]
    losses = Evaluator(PrunableModel.of(model)).losses(model_masks, tokens, repaired)
    torch.testing.assert_close(measured(model, model_masks, tokens, 1.0, repaired).loss, losses, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("masks", [1, 2])
def test_divergence_does_not_depend_on_how_much_exists_at_once(monkeypatch, rows: int, masks: int) -> None:
    model, tokens = tiny_model("gemma2"), random_tokens()
    model_masks = [MODEL_MASKS[name](model) for name in NAMES]
    whole = measured(model, model_masks, tokens, 1.0)
    for name, value in (("ROWS", rows), ("SOFTMAX_ROWS", 5), ("MASKS", masks)):
        monkeypatch.setattr(divergences, name, value)
    parts = measured(model, model_masks, tokens, 1.0)
    for got, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


def test_each_mask_has_the_same_value_alone_and_among_others() -> None:
    model, tokens = tiny_model("qwen3"), random_tokens()
    model_masks = [MODEL_MASKS[name](model) for name in NAMES]
    alone = [float(measured(model, [model_mask], tokens, 1.0).objective) for model_mask in model_masks]
    assert measured(model, model_masks, tokens, 1.0).objective.tolist() == alone


def test_windows_run_in_parts_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny_model("gemma2"), random_tokens(rows=7)
    model_masks = [MODEL_MASKS[name](model) for name in NAMES]
    whole, sizes, original = measured(model, model_masks, tokens, 1.0), [], divergences.last_hidden_states

    def limited(causal: nn.Module, windows: Tensor) -> Tensor:
        sizes.append(len(windows))
        if len(windows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(causal, windows)

    monkeypatch.setattr(divergences, "last_hidden_states", limited)
    parts = measured(model, model_masks, tokens, 1.0)
    assert sizes == [7, 4, *[2, 2, 2, 1] * 4]
    for got, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


def test_positions_run_in_parts_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The part that fails has counted one of the masks already."""
    model, tokens = tiny_model("llama-gqa"), random_tokens()
    model_masks = [MODEL_MASKS[name](model) for name in NAMES]
    whole, calls, original = measured(model, model_masks, tokens), [], divergences.divergence_and_loss

    def limited(reference: Tensor, *rest: Tensor) -> Tensor:
        calls.append(len(reference))
        if len(reference) > 20 and len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(reference, *rest)

    monkeypatch.setattr(divergences, "divergence_and_loss", limited)
    parts = measured(model, model_masks, tokens)
    assert calls == [69, 69, 35, *[18] * 9, *[15] * 3]
    for got, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
