"""Moments of experts and what a router does, against formulas by hand."""

from __future__ import annotations

import pytest
import torch
from helpers.blocks import batches, model_unchanged
from helpers.experts import activations, router_of, routing
from helpers.models import EXPERT_ARCHITECTURES, tiny_model
from torch import Tensor, nn
from torch.nn import functional

from pgprune_cli.forward.expert_moments import ExpertMoments, gated_inputs
from pgprune_cli.forward.moments import observe_moments
from pgprune_cli.forward.shards import start_sharded
from pgprune_cli.model.families.experts import ExpertsFamily
from pgprune_cli.model.prunable import PrunableModel

experts_only = pytest.mark.parametrize("architecture", EXPERT_ARCHITECTURES)


def observed(model: nn.Module, index: int) -> tuple[Tensor, Tensor]:
    """Return the inputs of a layer's FFN `(N, hidden)` and the residual stream before its norm, over all batches."""
    layer, inputs, residuals = model.model.layers[index], [], []
    pairs = ((layer.mlp, inputs), (layer.post_attention_layernorm, residuals))
    handles = [
        module.register_forward_pre_hook(lambda _, args, into=into: into.append(args[0].flatten(0, -2)))
        for module, into in pairs
    ]
    with torch.no_grad():
        for tokens in batches():
            model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.cat(inputs), torch.cat(residuals)


def logits_of(layer: nn.Module, inputs: Tensor) -> Tensor:
    router = router_of(layer)
    return functional.linear(inputs, router.weight, getattr(router, "bias", None))


def moments_of(model: nn.Module, index: int, kept: Tensor | None = None) -> ExpertMoments:
    prunable = PrunableModel.of(model)
    run = start_sharded(prunable, batches())
    for layer in range(index):
        run.advance(layer)
    moments = observe_moments(run, index, prunable.family, prunable.family.ffn, kept)
    assert isinstance(moments, ExpertMoments)
    return moments


@experts_only
@pytest.mark.parametrize("kept", [None, [0, 3, 6], [5]], ids=["all", "three", "one"])
def test_moments_are_weighted_by_squared_gate_over_squared_residual(architecture: str, kept: list[int] | None) -> None:
    model = tiny_model(architecture)
    inputs, residual = observed(model, 1)
    with model_unchanged(model):
        moments = moments_of(model, 1, None if kept is None else torch.tensor(kept))
    layer = model.model.layers[1]
    logits = logits_of(layer, inputs)
    if kept is not None:
        removed = [expert for expert in range(8) if expert not in kept]
        logits[:, removed] = -torch.inf
    gates, chosen = routing(router_of(layer), logits)
    for expert in range(8):
        gate = (gates * (chosen == expert)).sum(1).double()
        x = activations(layer, expert, inputs).double()
        weight = gate.square() / residual.double().square().mean(1) / len(inputs)
        torch.testing.assert_close(moments.second[expert].double(), (x * weight[:, None]).T @ x, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(moments.first[expert].double(), weight @ x, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(moments.weight[expert].double(), weight.sum(), rtol=1e-4, atol=1e-6)
    routed_experts = range(8) if kept is None else kept
    used = min(2, len(routed_experts))
    assert int(moments.tokens.sum()) == used * len(inputs)
    assert all(moments.tokens[expert] == 0 for expert in range(8) if expert not in routed_experts)


@experts_only
@pytest.mark.parametrize("count", [8, 5, 2, 1])
def test_gates_of_a_token_sum_to_one_over_the_kept_experts(architecture: str, count: int) -> None:
    model = tiny_model(architecture)
    family = PrunableModel.of(model).family
    assert isinstance(family, ExpertsFamily)
    inputs, _ = observed(model, 2)
    kept = torch.arange(8)[-count:]
    total, experts_of = torch.zeros(len(inputs)), torch.zeros(len(inputs), dtype=torch.int64)
    for expert, tokens, gates, _ in family.routed(model.model.layers[2], inputs, kept):
        assert expert in kept or not len(tokens)
        total[tokens] += gates
        experts_of[tokens] += 1
    torch.testing.assert_close(total, torch.ones_like(total))
    assert (experts_of == min(2, count)).all()


@experts_only
def test_gated_inputs_times_all_output_projections_are_the_blocks_output(architecture: str) -> None:
    """Except for the biases of gpt-oss, which are zero here."""
    model = tiny_model(architecture)
    prunable = PrunableModel.of(model)
    family, layer = prunable.family, prunable.layers[1]
    assert isinstance(family, ExpertsFamily)
    if hasattr(layer.mlp.experts, "down_proj_bias"):
        layer.mlp.experts.down_proj_bias.zero_()
    inputs, _ = observed(model, 1)
    gated = torch.cat(list(gated_inputs(family, layer, family.ffn, inputs[None])))
    *_, (weight, _) = family.matrices(layer, family.ffn).values()
    output = layer.mlp(inputs[None])
    output = output[0] if isinstance(output, tuple) else output
    torch.testing.assert_close(gated @ weight.T, output[0], rtol=1e-4, atol=1e-4)
