"""Inputs and outputs of single blocks of a tiny model, observed by hooks on whole forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from helpers.models import VOCABULARY
from pgprune_cli.forward.moments import Moments

KV_HEADS, CHANNELS, LAYERS = 4, 24, 4
BLOCKS = [(index, name) for index in range(LAYERS) for name in ("attention", "ffn")]


def batches() -> list[Tensor]:
    """Return batches of several shapes, most of them longer than the tiny Mistral's window of 16."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, shape, generator=generator) for shape in ((2, 20), (1, 40), (2, 20), (3, 7))]


def output_linear(model: nn.Module, index: int, name: str) -> nn.Linear:
    """Return the output projection of a block."""
    layer = model.model.layers[index]
    return layer.self_attn.o_proj if name == "attention" else layer.mlp.down_proj


def columns_of(mask: Tensor, inputs: int) -> Tensor:
    """Return the columns, of `inputs` in all, of an output projection that belong to the kept units."""
    return mask.repeat_interleave(inputs // len(mask)).nonzero().flatten()


def mask_of_first(order: Tensor, kept: int) -> Tensor:
    """Return the mask that keeps the first `kept` units of an order."""
    mask = torch.zeros(len(order), dtype=torch.bool)
    mask[order[:kept]] = True
    return mask


def observed_inputs(model: nn.Module, index: int, name: str, text: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Return the inputs `(N, in)` of an output projection on all batches, float64, and the tokens' weights `(N,)`.

    A weight is 1 / mean square of the residual stream after the attention.
    """
    inputs: list[Tensor] = []
    residuals: list[Tensor] = []
    recorded = [
        (output_linear(model, index, name), inputs),
        (model.model.layers[index].post_attention_layernorm, residuals),
    ]
    handles = [
        module.register_forward_pre_hook(lambda _, args, into=into: into.append(args[0].flatten(0, -2).double()))
        for module, into in recorded
    ]
    with torch.no_grad():
        for tokens in text or batches():
            model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.cat(inputs), 1.0 / torch.cat(residuals).square().mean(-1)


def moments_by_hand(x: Tensor, weights: Tensor) -> Moments:
    """Return the weighted moments of inputs `(N, in)` by their formula."""
    share = weights / weights.sum()
    return Moments((x * share[:, None]).T @ x, share @ x, weights.mean())


def weighted_error(expected: Tensor, outputs: Tensor, weights: Tensor) -> float:
    """Return the squared error summed over tokens, each with its weight."""
    return float((weights[:, None] * (expected - outputs).square()).sum())


@contextmanager
def model_unchanged(model: nn.Module) -> Iterator[None]:
    """Fail unless the body leaves the model's tensors unchanged, bit for bit and in place, and adds no hooks."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    yield
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == pointers
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
