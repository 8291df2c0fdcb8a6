"""Weighted moments, collected layer by layer and batch by batch, equal those of all tokens at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.blocks import BLOCKS, LAYERS, batches, model_unchanged, moments_by_hand, observed_inputs
from helpers.models import VOCABULARY, tiny_model
from torch import Tensor

from pgprune_cli.forward.layerwise import start_layerwise
from pgprune_cli.forward.moments import MomentCollector, Moments, observe_moments
from pgprune_cli.forward.shards import start_sharded
from pgprune_cli.model.families import family_of
from pgprune_cli.model.families.llama import LLAMA
from pgprune_cli.model.prunable import PrunableModel

NORM = "post_attention_layernorm"
"""In front of the FFN: it reads the residual run."""


def assert_moments(moments: Moments, expected: Moments) -> None:
    assert moments.second.dtype == moments.first.dtype == torch.float32
    scale = float(expected.second.diagonal().mean())
    torch.testing.assert_close(moments.second, expected.second.float(), rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(moments.first, expected.first.float(), rtol=1e-4, atol=1e-5 * scale**0.5)
    assert float(moments.weight) == pytest.approx(float(expected.weight), rel=1e-5)


def test_one_pass_collects_the_moments_of_every_block(architecture: str) -> None:
    """Batches of several shapes, and both blocks of a layer at once."""
    model = tiny_model(architecture)
    family = family_of(model.config.model_type)
    collected: dict[tuple[int, str], Moments] = {}
    with model_unchanged(model):
        run = start_layerwise(PrunableModel.of(model), batches())
        for index in range(LAYERS):
            collector = MomentCollector(family, family.blocks_of(run.layers[index]))
            run.advance(index, collector.observers)
            for name in ("attention", "ffn"):
                collected[index, name] = collector.moments(name)
    for key in BLOCKS:
        assert_moments(collected[key], moments_by_hand(*observed_inputs(model, *key)))


@pytest.mark.parametrize("name", ["attention", "ffn"])
def test_observing_runs_one_layer_and_does_not_advance_the_run(architecture: str, name: str) -> None:
    model = tiny_model(architecture)
    with model_unchanged(model):
        run = start_sharded(PrunableModel.of(model), batches())
        run.advance(0)
        before = [hidden.clone() for hidden in run.hidden_states]
        prunable = PrunableModel.of(model)
        moments = observe_moments(run, 1, prunable.family, prunable.shape.blocks[1][name])
        assert {own.position for own in run.runs} == {1}
        assert all(torch.equal(after, states) for after, states in zip(run.hidden_states, before, strict=True))
    assert_moments(moments, moments_by_hand(*observed_inputs(model, 1, name)))


@pytest.mark.parametrize("names", [["attention"], ["ffn"], []])
def test_collector_observes_only_the_named_blocks(names: list[str]) -> None:
    model = tiny_model("qwen2")
    collector = MomentCollector(LLAMA, [LLAMA.block(name) for name in names])
    start_layerwise(PrunableModel.of(model), batches()).observe(0, collector.observers)
    assert list(collector.sums) == names
    for name in names:
        assert_moments(collector.moments(name), moments_by_hand(*observed_inputs(model, 0, name)))
    assert collector.sums == {}  # they were dropped


@pytest.mark.parametrize("factor", [10.0, 1e4])
def test_token_with_a_huge_residual_stream_counts_as_one_token(factor: float) -> None:
    """A token a thousand times as large as the others, with equally large inputs, moves the mean as one of many."""
    collector = MomentCollector(LLAMA, [LLAMA.ffn])
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(1, 50, 6, generator=generator), torch.randn(1, 50, 32, generator=generator)
    by_hand = moments_by_hand(x[0].double(), 1.0 / residual[0].double().square().mean(-1))
    x[0, 0], residual[0, 0] = factor * x[0, 0], factor * residual[0, 0]
    collector.observers[NORM, "mlp.down_proj"](residual, x)
    moments = collector.moments("ffn")
    # Times its weight, the second moment is relative to the residual stream: the factor cancels.
    expected = (by_hand.second * by_hand.weight).float()
    torch.testing.assert_close(moments.second * moments.weight, expected, rtol=1e-5, atol=1e-5)


def test_token_with_a_zero_residual_stream_does_not_divide_by_zero() -> None:
    collector = MomentCollector(LLAMA, [LLAMA.ffn])
    collector.observers[NORM, "mlp.down_proj"](torch.zeros(1, 3, 32), torch.zeros(1, 3, 24))
    moments = collector.moments("ffn")
    assert moments.second.abs().max() == moments.first.abs().max() == 0.0


def test_token_counts_less_if_a_norm_follows_the_block_and_its_output_is_large() -> None:
    """An error is then divided by the length of the block's own output."""
    block = replace(LLAMA.ffn, post_norm="norm_behind")
    collector = MomentCollector(LLAMA, [block])
    generator = torch.Generator().manual_seed(0)
    x, residual, output = (torch.randn(2, 25, size, generator=generator) for size in (6, 32, 32))
    output[0, :7] *= 30.0
    weights = 1.0 / (residual.double().square().mean(-1) * output.double().square().mean(-1))
    collector.observers[NORM, "mlp.down_proj", "norm_behind"](residual, x, output)
    assert_moments(collector.moments("ffn"), moments_by_hand(x.flatten(0, 1).double(), weights.flatten()))


def test_moments_do_not_depend_on_how_tokens_are_batched() -> None:
    model = tiny_model("llama-gqa")
    tokens = torch.randint(VOCABULARY, (6, 20), generator=torch.Generator().manual_seed(0))

    def moments(text: list[Tensor]) -> Moments:
        return observe_moments(start_sharded(PrunableModel.of(model), text), 0, LLAMA, LLAMA.ffn)

    whole = moments([tokens])
    for sizes in ([1] * 6, [2, 4], [3, 1, 2]):
        assert_moments(moments(list(tokens.split(sizes))), whole)
