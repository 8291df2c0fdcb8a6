"""The statistics that metrics work from, compared with formulas on all inputs at once."""

import weakref
from typing import get_args

import pytest
import torch
from helpers.blocks import error_root_of, observed_inputs
from helpers.models import VOCABULARY, tiny_model
from torch import Tensor

from pgprune_cli.console.progress import LayerProgress
from pgprune_cli.forward.curvature import error_roots
from pgprune_cli.forward.moments import MomentCollector
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.scores.metrics import score
from pgprune_cli.scores.statistics import (
    Collector,
    Fluctuations,
    InputNorms,
    Statistic,
    block_seed,
    loss_gradients,
    statistics,
)


def calibration(batches: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (2, 20), generator=generator) for _ in range(batches)]


def random_inputs(mean: float, deviation: float) -> Tensor:
    """Return inputs `(windows, tokens, in)`."""
    generator = torch.Generator().manual_seed(1)
    return mean + deviation * torch.randn(6, 50, 8, generator=generator)


def collected(collector: Collector, inputs: Tensor) -> Tensor:
    """Return what a collector makes of batches of different lengths, one of them a single token."""
    for batch in (inputs[:1, :1], inputs[:1, 1:], inputs[1:3], inputs[3:]):
        collector.add(batch)
    return collector.value()


def test_collectors_equal_the_formula_on_all_inputs() -> None:
    inputs = random_inputs(0.5, 2.0)
    rows = inputs.flatten(0, 1).double()
    torch.testing.assert_close(collected(InputNorms(), inputs), rows.norm(dim=0), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(collected(Fluctuations(), inputs), rows.var(0), rtol=1e-6, atol=0.0)


def test_fluctuations_are_exact_for_a_small_variance_around_a_large_mean() -> None:
    """A float32 sum of squares minus the squared sum would be noise here."""
    inputs = random_inputs(1000.0, 0.05)
    collector = Fluctuations()
    rows = inputs.flatten(0, 1).double()
    torch.testing.assert_close(collected(collector, inputs), rows.var(0), rtol=1e-3, atol=0.0)
    torch.testing.assert_close(collector.mean, rows.mean(0), rtol=1e-6, atol=0.0)


def test_collectors_do_not_overflow_on_half_precision_inputs() -> None:
    inputs = random_inputs(0.0, 1.0).mul(1000.0).half()
    for collector in (InputNorms(), Fluctuations()):
        assert collected(collector, inputs).isfinite().all()


@pytest.mark.parametrize("needed", [None, *get_args(Statistic)])
def test_statistics_collect_only_the_requested_statistic(needed: Statistic | None) -> None:
    blocks = list(statistics(PrunableModel.of(tiny_model("qwen2")), needed, calibration(), seed=0))
    assert [(name, layer) for name, layer, _ in blocks] == [
        (name, layer) for layer in range(4) for name in ("attention", "ffn")
    ]
    for _, _, block in blocks:
        assert [name for name in get_args(Statistic) if getattr(block, name) is not None] == [needed] * bool(needed)
        assert (block.error_root is not None) == (needed == "covariance")
        for key, gradient in (block.gradients or {}).items():
            assert gradient.shape == block.weights[key].shape


def test_covariances_are_relative_to_each_tokens_residual_stream(architecture: str) -> None:
    """Each is the mean over tokens of x xᵀ / mean square of the residual stream, and comes with its error root."""
    model = tiny_model(architecture)
    roots, block_count = error_roots(PrunableModel.of(model), calibration()), 0
    for name, layer, block in statistics(PrunableModel.of(model), "covariance", calibration(), seed=0):
        x, weights = observed_inputs(model, layer, name, calibration())
        expected = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
        for token, weight in zip(x, weights, strict=True):
            expected += weight * torch.outer(token, token) / len(x)
        assert block.covariance.dtype == block.error_root.dtype == torch.float32
        scale = float(expected.diagonal().mean())
        torch.testing.assert_close(block.covariance, expected.float(), rtol=1e-4, atol=1e-5 * scale)
        torch.testing.assert_close(block.error_root, error_root_of(model, layer, name, roots[layer]).float())
        block_count += 1
    assert block_count == 8


@pytest.mark.parametrize("shards", [1, 2])
def test_at_most_the_two_covariances_of_one_layer_exist_at_a_time(shards: int, monkeypatch) -> None:
    """In each shard of the text."""
    monkeypatch.setattr("pgprune_cli.forward.shards.SHARDS", shards)
    matrices: list[weakref.ref] = []
    peak = 0
    add = MomentCollector._add

    def counting(self: MomentCollector, name: str, residual: Tensor, inputs: Tensor, *rest: Tensor) -> None:
        nonlocal peak
        add(self, name, residual, inputs, *rest)
        second = self.sums[name].second.sums
        if all(matrix() is not second for matrix in matrices):
            matrices.append(weakref.ref(second))
        peak = max(peak, sum(matrix() is not None for matrix in matrices))

    monkeypatch.setattr(MomentCollector, "_add", counting)
    score(PrunableModel.of(tiny_model("llama-gqa")), "obs", calibration(), seed=0)
    assert len(matrices) == 8 * shards
    assert peak == 2 * shards


def test_loss_gradients_leave_the_model_unchanged() -> None:
    model = tiny_model("llama-gqa")
    trained = model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    trained.grad = original_gradient = torch.ones_like(trained)
    model.model.embed_tokens.weight.requires_grad_(True)
    before = {name: (p, p.requires_grad, p.grad, p.clone()) for name, p in model.named_parameters()}

    for batches in (calibration(), [*calibration(1), torch.full((1, 4), VOCABULARY)]):
        try:
            gradients = loss_gradients(PrunableModel.of(model), batches)
        except IndexError:
            pass
        else:
            assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients.values())
            assert not any(gradient.requires_grad for gradient in gradients.values())
        for name, parameter in model.named_parameters():
            original, required, gradient, values = before[name]
            assert parameter is original
            assert parameter.requires_grad == required
            assert parameter.grad is gradient
            assert torch.equal(parameter, values)
    assert torch.equal(original_gradient, torch.ones_like(original_gradient))


def test_loss_gradients_work_inside_no_grad() -> None:
    with torch.no_grad():
        gradients = loss_gradients(PrunableModel.of(tiny_model("qwen3")), calibration(1))
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("needed", ["covariance", "gradients"])
def test_statistics_report_batches_that_pass_all_layers_before_the_first_block(needed: Statistic) -> None:
    class Recorder(LayerProgress):
        def __init__(self) -> None:
            self.reports: list[tuple[int, int]] = []

        def batches_done(self, done: int, total: int) -> None:
            self.reports.append((done, total))

    model, text, progress = tiny_model("llama-gqa"), calibration(), Recorder()
    next(statistics(PrunableModel.of(model), needed, text, seed=0, progress=progress))
    first = 0 if needed == "covariance" else 1
    assert progress.reports == [(done, len(text)) for done in range(first, len(text) + 1)]


def test_block_seeds_differ_within_a_model() -> None:
    seeds = {block_seed(seed, layer, place) for seed in range(3) for layer in range(200) for place in range(2)}
    assert len(seeds) == 1200
