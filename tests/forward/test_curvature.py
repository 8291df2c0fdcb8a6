"""The curvature of the loss in its last hidden state: against its definition, and against the loss itself."""

from __future__ import annotations

import pytest
import torch
from helpers.blocks import batches, model_unchanged
from helpers.models import tiny_config, tiny_model
from torch import Tensor, nn

from pgprune_cli.errors import RunError
from pgprune_cli.forward import curvature as sensitivity
from pgprune_cli.forward.curvature import SHARE, WINDOWS, curvature_windows, error_roots, output_curvature
from pgprune_cli.model.prunable import PrunableModel


def final_inputs(model: nn.Module, text: list[Tensor]) -> Tensor:
    """What the unembedding reads, token by token: `(N, hidden)` float64."""
    with torch.no_grad():
        return torch.cat([model.model(input_ids=tokens).last_hidden_state.flatten(0, 1).double() for tokens in text])


def norm_of(model: nn.Module) -> Tensor:
    """What the final norm multiplies with: `(hidden,)` float64."""
    prunable = PrunableModel.of(model)
    return prunable.family.norm_weight(prunable.final_norm).double()


def logits_of_inputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """The model's logits, of inputs `(N, hidden)` of the unembedding, float64."""
    prunable = PrunableModel.of(model)
    return prunable.family.finish_logits(model.config, inputs @ prunable.head.weight.double().T)


def curvature_by_loops(model: nn.Module, text: list[Tensor]) -> Tensor:
    """G from its definition: Uᵀ (diag p − p pᵀ) U of each token alone, averaged, the norm's weights on both sides."""
    unembedding, norm = PrunableModel.of(model).head.weight.double(), norm_of(model)
    total = torch.zeros(32, 32, dtype=torch.float64)
    hidden = final_inputs(model, text)
    for p in logits_of_inputs(model, hidden).softmax(1):
        total += unembedding.T @ (torch.diag(p) - torch.outer(p, p)) @ unembedding
    return torch.diag(norm) @ (total / len(hidden)) @ torch.diag(norm)


def scaled(matrix: Tensor) -> Tensor:
    return matrix / matrix.diagonal().mean()


def softened(architecture: str) -> nn.Module:
    """A tiny model whose probabilities are not all 0 or 1."""
    model = tiny_model(architecture)
    PrunableModel.of(model).head.weight.data.mul_(0.3)
    return model


def test_the_curvature_is_what_its_definition_says(architecture: str) -> None:
    model = softened(architecture)
    with model_unchanged(model):
        curvature = output_curvature(PrunableModel.of(model), batches())
    assert (curvature.shape, curvature.dtype) == ((32, 32), torch.float64)
    torch.testing.assert_close(curvature, scaled(curvature_by_loops(model, batches())), rtol=1e-4, atol=3e-4)


def test_the_curvature_is_symmetric_and_nowhere_negative(architecture: str) -> None:
    curvature = output_curvature(PrunableModel.of(softened(architecture)), batches())
    values = torch.linalg.eigvalsh(curvature)
    torch.testing.assert_close(curvature, curvature.T, rtol=1e-5, atol=1e-5)
    assert float(values[0]) > -1e-4 * float(values[-1])
    assert float(curvature.diagonal().mean()) == pytest.approx(1.0)


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_how_many_logits_exist_at_a_time_does_not_matter(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of tokens nor of the vocabulary, whose chunks are sixteen times as long."""
    model = softened("qwen2")
    whole = output_curvature(PrunableModel.of(model), batches())
    monkeypatch.setattr(sensitivity, "LOGIT_ROWS", rows)
    torch.testing.assert_close(output_curvature(PrunableModel.of(model), batches()), whole, rtol=1e-4, atol=1e-5)


def test_the_curvature_predicts_what_a_small_error_costs(architecture: str) -> None:
    """½ eᵀ G e against the KL divergence of the logits, e added to the normalised stream of every token.

    One scale for all directions, among them the dearest and the cheapest: G is scaled.
    """
    model = softened(architecture)
    curvature = output_curvature(PrunableModel.of(model), batches())
    inputs, norm = final_inputs(model, batches()), norm_of(model)
    logits = logits_of_inputs(model, inputs)
    _, vectors = torch.linalg.eigh(curvature)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(32, 5, generator=generator, dtype=torch.float64)
    ratios = []
    for direction in torch.cat([vectors[:, [3, 10, 20, 31]], drawn / drawn.norm(dim=0)], dim=1).T:
        error = 1e-3 * direction
        moved = logits_of_inputs(model, inputs + norm * error)
        divergence = (logits.softmax(1) * (logits.log_softmax(1) - moved.log_softmax(1))).sum(1).mean()
        ratios.append(float(divergence / (0.5 * error @ curvature @ error)))
    assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=0.02)
    if torch.equal(logits, inputs @ PrunableModel.of(model).head.weight.double().T):  # nothing follows the head
        assert ratios[0] == pytest.approx(float(curvature_by_loops(model, batches()).diagonal().mean()), rel=0.02)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([3], [3]),
        ([20], [16]),
        ([5, 15], [15, 1]),
        ([20, 20, 20], [16]),
        ([4] * 40, [4, 4, 4, 4]),
        ([1] * 17, [1] * 16),
    ],
    ids=str,
)
def test_curvature_runs_16_windows_in_batches_no_larger_than_those_it_is_given(
    counts: list[int], expected: list[int]
) -> None:
    model, runs = softened("llama-mha"), []
    handle = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: runs.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    output_curvature(PrunableModel.of(model), [torch.zeros(count, 3, dtype=torch.int64) for count in counts])
    handle.remove()
    assert runs == expected
    assert sum(runs) == min(WINDOWS, sum(counts))


def test_windows_of_the_curvature_are_spread_over_the_batches_and_sorted_by_length() -> None:
    windows = torch.arange(32)[:, None].expand(32, 4)
    short = torch.full((3, 2), 7)
    parts = curvature_windows([windows[:10], short, windows[10:]])
    assert [list(part.shape) for part in parts] == [[15, 4], [1, 2]]
    assert parts[0][:, 0].tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 21, 23, 25, 27, 29]
    assert curvature_windows([]) == []


def test_without_text_there_is_no_curvature() -> None:
    with pytest.raises(ValueError, match="no calibration text"):
        output_curvature(PrunableModel.of(tiny_model("qwen2")), [])


def test_a_model_that_overflows_is_named_as_that() -> None:
    model = tiny_model("qwen2")
    model.model.layers[1].mlp.down_proj.weight.data[0] = 1e38
    with pytest.raises(RunError, match="the logits on the calibration text are not finite"):
        error_roots(PrunableModel.of(model), batches())


def test_roots_are_of_a_mixture_that_only_late_layers_have(architecture: str) -> None:
    model = softened(architecture)
    roots = error_roots(PrunableModel.of(model), batches())
    curvature, identity = output_curvature(PrunableModel.of(model), batches()), torch.eye(32, dtype=torch.float64)
    assert len(roots) == 4
    for index, root in enumerate(roots):
        share = SHARE * {0: 0.0, 1: 0.0, 2: 1 / 3, 3: 1.0}[index]
        assert root.dtype == torch.float32
        weight = root.double().T @ root.double()
        torch.testing.assert_close(weight, (1 - share) * identity + share * curvature, rtol=1e-5, atol=1e-5)
        assert float(weight.diagonal().mean()) == pytest.approx(1.0, abs=1e-6)
    assert torch.equal(roots[0], identity.float())
    assert torch.equal(roots[1], identity.float())


@pytest.mark.parametrize(("layers", "shares"), [(1, [0.0]), (2, [0.0, 1.0]), (3, [0.0, 0.0, 1.0])])
def test_models_of_few_layers_have_roots_too(layers: int, shares: list[float]) -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_config("llama-mha")
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    curvature, identity = output_curvature(PrunableModel.of(model), batches()), torch.eye(32, dtype=torch.float64)
    for root, share in zip(error_roots(PrunableModel.of(model), batches()), shares, strict=True):
        expected = (1 - SHARE * share) * identity + SHARE * share * curvature
        torch.testing.assert_close(root.double().T @ root.double(), expected, rtol=1e-5, atol=1e-5)


def test_an_error_costs_its_length_on_average_over_directions() -> None:
    """‖R e‖² over random unit vectors e, in every layer."""
    drawn = torch.randn(32, 20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    roots = error_roots(PrunableModel.of(softened("mistral")), batches())
    assert len(roots) == 4
    for root in roots:
        cost = (root.double() @ (drawn / drawn.norm(dim=0))).square().sum(0)
        assert float(cost.mean()) == pytest.approx(1.0, rel=0.03)
