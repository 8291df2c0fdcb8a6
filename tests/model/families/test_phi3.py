"""What is special about Phi-3: fused projections, and an attention that reads its number of heads from the config."""

from __future__ import annotations

import pytest
import torch
from helpers.masks import draw, logits_of, random_tokens
from helpers.models import tiny_config, tiny_model
from torch import nn

from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.model.families import family_of
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.unit_tensors import Part

FAMILY = family_of("phi3")


def long_rope_model() -> nn.Module:
    """A tiny Phi-3 whose frequencies change at 20 tokens."""
    from transformers import AutoModelForCausalLM

    factors = {"short_factor": [1.0, 1.1], "long_factor": [1.0, 4.0], "partial_rotary_factor": 0.5}
    config = type(tiny_config("phi3"))(
        **tiny_config("phi3").to_dict()
        | {"hidden_size": 64, "original_max_position_embeddings": 20}
        | {"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **factors}}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def test_unit_tensors_are_the_parts_of_the_fused_projections() -> None:
    layer = tiny_model("phi3").model.layers[0]
    tensors = [tensor for block in FAMILY.blocks for tensor in FAMILY.unit_tensors(layer, block)]
    assert [(tensor.name, tensor.axis, tensor.parts) for tensor in tensors] == [
        ("qkv_proj.weight", 0, (Part(8, 8), Part(4, 8), Part(4, 8))),
        ("o_proj.weight", 1, (Part(8, 8),)),
        ("gate_up_proj.weight", 0, (Part(24, 1), Part(24, 1))),
        ("down_proj.weight", 1, (Part(24, 1),)),
    ]


def test_a_shrunk_attention_leaves_the_config_of_the_model_alone() -> None:
    model = tiny_model("phi3")
    mask = draw(model, [((2, 1), 24), ((0, 0), 3), ((3, 2), 5), ((4, 2), 24)])
    with Evaluator(PrunableModel.of(model)).shrunk(mask):
        logits_of(model, random_tokens())
    assert model.config.num_attention_heads == 8
    for layer in model.model.layers:
        assert layer.self_attn.config is model.config
        assert (layer.self_attn.num_key_value_heads, layer.self_attn.num_key_value_groups) == (4, 2)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_shrunk_attention_runs_with_the_implementation_of_the_model(implementation: str) -> None:
    model = tiny_model("phi3")
    mask = draw(model, [((2, 1), 24), ((4, 1), 3), ((3, 2), 5), ((1, 1), 24)])
    expected = Evaluator(PrunableModel.of(model)).losses([mask], random_tokens())
    model.set_attn_implementation(implementation)
    assert model.model.layers[0].self_attn.config._attn_implementation == implementation
    losses = Evaluator(PrunableModel.of(model)).losses([mask], random_tokens())
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("length", [16, 24])
def test_long_rope_switches_factors_with_and_without_a_mask(length: int) -> None:
    model, tokens = long_rope_model(), random_tokens(length=length)
    mask = draw(model, [((3, 2), 24), ((2, 1), 3), ((4, 2), 5), ((1, 1), 24)])
    with Evaluator(PrunableModel.of(model)).shrunk(mask):
        shrunk = logits_of(model, tokens)
    for layer, kept in zip(model.model.layers, mask, strict=True):
        layer.self_attn.o_proj.weight.data.mul_(kept.attention.repeat_interleave(8))
        layer.mlp.down_proj.weight.data.mul_(kept.ffn)
    torch.testing.assert_close(shrunk, logits_of(model, tokens), rtol=1e-4, atol=1e-4)


def test_long_rope_has_a_stock_config_only_with_all_heads() -> None:
    config = long_rope_model().config
    changes = FAMILY.stock_config(config, {"attention": (4, 2), "ffn": (1, 7)})
    assert changes == {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 7}
    assert type(config)(**config.to_dict() | changes).intermediate_size == 7
    assert FAMILY.stock_config(config, {"attention": (2, 2), "ffn": (1, 7)}) is None
    assert FAMILY.stock_config(tiny_config("phi3"), {"attention": (2, 2), "ffn": (1, 7)}) is not None
