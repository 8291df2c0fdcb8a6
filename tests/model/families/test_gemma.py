"""What is special about the Gemmas: norms around every block, weights of norms, soft-capping, windows per layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.masks import draw, grids_of, logits_of, random_tokens
from helpers.models import tiny_model
from torch import nn
from torch.nn import functional

from pgprune_cli.forward.curvature import output_curvature
from pgprune_cli.forward.layerwise import start_layerwise
from pgprune_cli.forward.masked import Evaluator, summed_loss
from pgprune_cli.forward.moments import MomentCollector
from pgprune_cli.forward.shrunk_block import shrunk_block
from pgprune_cli.model.families import family_of
from pgprune_cli.model.loading import load_model
from pgprune_cli.model.masks import columns_of
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.source import resolve
from pgprune_cli.repair.least_squares import compensated_output, repaired_output

GEMMAS = ("gemma2", "gemma3_text")


@pytest.fixture(params=GEMMAS)
def gemma(request: pytest.FixtureRequest) -> nn.Module:
    return tiny_model(request.param)


def test_norm_weight_is_what_a_norm_multiplies_with(gemma: nn.Module) -> None:
    norm = gemma.model.layers[1].post_feedforward_layernorm
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    expected = functional.rms_norm(x, (32,), eps=norm.eps) * family_of(gemma.config.model_type).norm_weight(norm)
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_summed_loss_is_that_of_soft_capped_logits(gemma: nn.Module, cap: float | None) -> None:
    gemma.config.final_logit_softcapping = cap
    tokens = random_tokens()
    logits = logits_of(gemma, tokens)
    assert (float(logits.abs().max()) <= 2.0) == (cap is not None)
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(summed_loss(gemma, tokens), expected)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_the_curvature_predicts_what_a_small_error_costs(gemma: nn.Module, cap: float | None) -> None:
    """½ eᵀ G e against the KL divergence of the soft-capped logits, for the costliest, a cheap and a random error e."""
    gemma.config.final_logit_softcapping = cap
    model, tokens = PrunableModel.of(gemma), random_tokens()
    curvature = output_curvature(model, [tokens])
    with torch.no_grad():
        states = gemma.model(input_ids=tokens).last_hidden_state.flatten(0, 1).double()
    unembedding, norm = gemma.lm_head.weight.double(), 1 + gemma.model.norm.weight.double()

    def log_probabilities(states: torch.Tensor) -> torch.Tensor:
        return model.family.finish_logits(gemma.config, states @ unembedding.T).log_softmax(1)

    expected, ratios = log_probabilities(states), []
    _, vectors = torch.linalg.eigh(curvature)
    drawn = torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for direction in (vectors[:, 31], vectors[:, 10], drawn / drawn.norm()):
        error = 1e-3 * direction
        divergence = (expected.exp() * (expected - log_probabilities(states + norm * error))).sum(1).mean()
        ratios.append(float(divergence / (0.5 * error @ curvature @ error)))
    assert ratios == pytest.approx([ratios[0]] * 3, rel=0.05)


def test_a_removed_block_adds_nothing_behind_its_norm(gemma: nn.Module) -> None:
    model, tokens = PrunableModel.of(gemma), random_tokens()
    mask = draw(gemma, [(4, 24), (0, 24), (4, 0), (0, 0)])
    with Evaluator(model).shrunk(mask):
        shrunk = logits_of(gemma, tokens)
    for index, name in ((1, "post_attention"), (2, "post_feedforward"), (3, "post_attention"), (3, "post_feedforward")):
        norm = gemma.model.layers[index].get_submodule(f"{name}_layernorm")
        norm.weight.data.fill_(-1.0)  # 1 + w = 0
    torch.testing.assert_close(shrunk, logits_of(gemma, tokens))


def test_windows_differ_by_layer(gemma: nn.Module) -> None:
    family = family_of(gemma.config.model_type)
    windows = [family.attention_window(gemma.config, layer, 100) for layer in gemma.model.layers]
    assert windows == [{"sliding_attention": 16, "full_attention": 100}[kind] for kind in gemma.config.layer_types]


def test_layers_get_the_masks_and_positions_of_their_kind_when_run_one_by_one(gemma: nn.Module) -> None:
    tokens = random_tokens(length=40)
    run = start_layerwise(PrunableModel.of(gemma), [tokens])
    for index in range(4):
        run.advance(index)
    with torch.no_grad():
        expected = gemma.model(input_ids=tokens, use_cache=False).last_hidden_state
        torch.testing.assert_close(gemma.model.norm(run.hidden_states[0]), expected)


def test_a_gemma_whose_heads_do_not_divide_the_hidden_size_has_no_stock_config(gemma: nn.Module) -> None:
    family = family_of(gemma.config.model_type)
    for heads, expected in (((2, 2), True), ((3, 2), False), ((3, 1), False)):
        changes = family.stock_config(gemma.config, {"attention": heads, "ffn": (1, 7)})
        assert (changes is not None) == expected
        if changes is not None:
            type(gemma.config)(**gemma.config.to_dict() | changes)


@pytest.mark.parametrize("weight_format", ["full", "int8"])
def test_embeddings_are_scaled_in_a_model_that_is_read_from_files(
    gemma: nn.Module, weight_format: str, tmp_path: Path
) -> None:
    gemma.save_pretrained(tmp_path)
    model = load_model(resolve(str(tmp_path)), "float32", "cpu", weight_format)
    tokens = random_tokens()
    torch.testing.assert_close(model.model.embed_tokens(tokens), gemma.model.embed_tokens(tokens))


@pytest.mark.parametrize("block_name", ["attention", "ffn"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_repair_is_never_worse_than_none_behind_the_norm(gemma: nn.Module, block_name: str, with_bias: bool) -> None:
    """The error of a token is relative to its residual stream and to the block's output, whose length the norm divides
    by. To first order, that is the error of the norm's output."""
    model, tokens = PrunableModel.of(gemma), random_tokens(rows=8, length=40)
    block, layer = model.family.block(block_name), model.layers[0]
    seen: dict[str, torch.Tensor] = {}

    def see(residual: torch.Tensor, inputs: torch.Tensor, output: torch.Tensor) -> None:
        seen.update(residual=residual, inputs=inputs, output=output)

    collector = MomentCollector(model.family, [block])
    paths = (model.family.residual, block.output_path, block.post_norm)
    start_layerwise(model, [tokens]).observe(0, collector.observers)
    start_layerwise(model, [tokens]).observe(0, {paths: see})
    moments = collector.moments(block_name)
    residual, inputs, output = (seen[name].flatten(0, 1).double() for name in ("residual", "inputs", "output"))
    weights = 1 / (residual.square().mean(-1) * output.square().mean(-1))
    torch.testing.assert_close(moments.weight.double(), weights.mean(), rtol=1e-4, atol=0)

    linear = block.output_linear(layer)
    mask = draw(gemma, [((3, 1), 9)] * 4)[0].of(block_name)
    width = linear.in_features // len(mask)
    columns = columns_of(mask.nonzero().squeeze(1), width)
    dense, kept = linear.weight, linear.weight[:, columns]
    repaired = repaired_output(dense, None, moments, columns, 1e-3, with_bias=with_bias)
    compensated = compensated_output(dense, None, moments, columns)

    def error(weight: torch.Tensor, bias: torch.Tensor | None) -> float:
        product = inputs[:, columns] @ weight.T.double() + (0 if bias is None else bias.double())
        return float((weights * (product - output).square().sum(1)).sum())

    assert error(*repaired[:2]) < error(kept, None)
    assert error(*repaired[:2]) <= error(*compensated[:2]) or not with_bias


def test_the_norm_cancels_any_scale_of_a_repaired_output(gemma: nn.Module) -> None:
    """So there is nothing to gain from scaling a repair, which shrinks a block's output, back to its old length."""
    model, tokens = PrunableModel.of(gemma), random_tokens()
    expected = logits_of(gemma, tokens)
    for layer in gemma.model.layers:
        layer.post_attention_layernorm.eps = layer.post_feedforward_layernorm.eps = 0.0
        for block in model.family.blocks:
            block.output_linear(layer).weight.data.mul_(0.5)
    torch.testing.assert_close(logits_of(gemma, tokens), expected, rtol=1e-3, atol=1e-3)


def test_one_kv_head_leaves_query_heads_to_remove() -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_model("gemma3_text").config
    config.num_attention_heads, config.num_key_value_heads = 4, 1
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    assert (grids_of(module, "attention")[0].groups, grids_of(module, "attention")[0].members) == (1, 4)
    model, tokens = PrunableModel.of(module), random_tokens()
    block, layer = model.family.attention, model.layers[0]
    mask = torch.tensor([True, False, True, True])
    with shrunk_block(model.family, layer, block, mask, None):
        shrunk = logits_of(module, tokens)
    layer.self_attn.o_proj.weight.data[:, 8:16] = 0
    torch.testing.assert_close(shrunk, logits_of(module, tokens))
