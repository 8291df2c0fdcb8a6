"""Weighted moments, layer by layer and batch by batch, against all tokens in one pile."""

from __future__ import annotations

import pytest
import torch
from helpers.blocks import BLOCKS, LAYERS, batches, left_as_it_was, moments_by_hand, seen
from helpers.models import VOCABULARY, tiny_model
from torch import Tensor

from pgprune_cli.forward.layerwise import start_layerwise
from pgprune_cli.forward.moments import MomentCollector, Moments, observe_moments
from pgprune_cli.model.prunable import PrunableModel

NORM = "post_attention_layernorm"
"""In front of the FFN: it reads the residual stream."""


def assert_moments(got: Moments, wanted: Moments) -> None:
    assert got.second.dtype == got.first.dtype == torch.float64
    scale = float(wanted.second.diagonal().mean())
    torch.testing.assert_close(got.second, wanted.second, rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(got.first, wanted.first, rtol=1e-4, atol=1e-5 * scale**0.5)
    assert float(got.weight) == pytest.approx(float(wanted.weight), rel=1e-5)


def test_one_pass_collects_the_moments_of_every_block(architecture: str) -> None:
    """Batches of several shapes, and both blocks of a layer at once."""
    model = tiny_model(architecture)
    found: dict[tuple[int, str], Moments] = {}
    with left_as_it_was(model):
        stream = start_layerwise(PrunableModel.of(model), batches())
        for index in range(LAYERS):
            collector = MomentCollector(PrunableModel.of(model).shape, ["attention", "ffn"])
            stream.advance(index, collector.watch)
            for name in ("attention", "ffn"):
                found[index, name] = collector.moments(name)
    for key in BLOCKS:
        assert_moments(found[key], moments_by_hand(*seen(model, *key)))


@pytest.mark.parametrize("name", ["attention", "ffn"])
def test_observing_runs_one_layer_and_leaves_the_stream_where_it_was(architecture: str, name: str) -> None:
    model = tiny_model(architecture)
    with left_as_it_was(model):
        stream = start_layerwise(PrunableModel.of(model), batches())
        stream.advance(0)
        before = [hidden.clone() for hidden in stream.hidden]
        moments = observe_moments(stream, 1, PrunableModel.of(model).shape, name)
        assert stream.position == 1
        assert all(torch.equal(one, other) for one, other in zip(stream.hidden, before, strict=True))
    assert_moments(moments, moments_by_hand(*seen(model, 1, name)))


@pytest.mark.parametrize("names", [["attention"], ["ffn"], []])
def test_only_the_blocks_that_are_named_are_watched(names: list[str]) -> None:
    model = tiny_model("qwen2")
    collector = MomentCollector(PrunableModel.of(model).shape, names)
    start_layerwise(PrunableModel.of(model), batches()).observe(0, collector.watch)
    assert list(collector.checksums) == names
    for name in names:
        assert_moments(collector.moments(name), moments_by_hand(*seen(model, 0, name)))
    assert collector.checksums == {}  # it let go of them


@pytest.mark.parametrize("factor", [10.0, 1e4])
def test_tokens_of_a_huge_residual_stream_count_no_more_than_others(factor: float) -> None:
    """A token a thousand times as large as the others, with inputs that much larger, moves the mean as one of many."""
    model = tiny_model("llama-gqa")
    collector = MomentCollector(PrunableModel.of(model).shape, ["ffn"])
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(1, 50, 6, generator=generator), torch.randn(1, 50, 32, generator=generator)
    by_hand = moments_by_hand(x[0].double(), 1.0 / residual[0].double().square().mean(-1))
    x[0, 0], residual[0, 0] = factor * x[0, 0], factor * residual[0, 0]
    collector.watch[NORM, "mlp.down_proj"](residual, x)
    moments = collector.moments("ffn")
    # Times its weight, the second moment is relative to the residual stream: the factor has no part in it.
    torch.testing.assert_close(moments.second * moments.weight, by_hand.second * by_hand.weight, rtol=1e-5, atol=1e-5)


def test_tokens_without_any_residual_stream_do_not_divide_by_zero() -> None:
    model = tiny_model("llama-gqa")
    collector = MomentCollector(PrunableModel.of(model).shape, ["ffn"])
    collector.watch[NORM, "mlp.down_proj"](torch.zeros(1, 3, 32), torch.zeros(1, 3, 24))
    moments = collector.moments("ffn")
    assert moments.second.abs().max() == moments.first.abs().max() == 0.0


def test_how_tokens_are_cut_into_batches_does_not_matter() -> None:
    model = tiny_model("llama-gqa")
    tokens = torch.randint(VOCABULARY, (6, 20), generator=torch.Generator().manual_seed(0))

    def moments(text: list[Tensor]) -> Moments:
        return observe_moments(start_layerwise(PrunableModel.of(model), text), 0, PrunableModel.of(model).shape, "ffn")

    whole = moments([tokens])
    for sizes in ([1] * 6, [2, 4], [3, 1, 2]):
        assert_moments(moments(list(tokens.split(sizes))), whole)
