"""Inputs and outputs of single blocks of a tiny model, observed by hooks on whole forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from helpers.masks import LAYERS
from helpers.models import VOCABULARY
from pgprune_cli.forward.moments import Moments
from pgprune_cli.model.prunable import PrunableModel

BLOCKS = [(index, name) for index in range(LAYERS) for name in ("attention", "ffn")]


def batches() -> list[Tensor]:
    """Return batches of several shapes, most of them longer than the tiny Mistral's window of 16."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, shape, generator=generator) for shape in ((2, 20), (1, 40), (2, 20), (3, 7))]


def output_linear(model: nn.Module, index: int, name: str) -> nn.Linear:
    """Return the output projection of a block."""
    prunable = PrunableModel.of(model)
    return prunable.shape.blocks[index][name].output_linear(prunable.layers[index])


def columns_of(mask: Tensor, inputs: int) -> Tensor:
    """Return the columns, of `inputs` in all, of an output projection that belong to the kept elements."""
    return mask.repeat_interleave(inputs // len(mask)).nonzero().flatten()


def columns_in_order(order: Tensor, mask: Tensor, inputs: int) -> Tensor:
    """Return the columns as `columns_of` does, element after element of an order."""
    width, kept = inputs // len(mask), order[mask[order]]
    return (kept[:, None] * width + torch.arange(width)).flatten()


def mask_of_first(order: Tensor, kept: int, partition: Tensor | None = None) -> Tensor:
    """Return the mask over elements that keeps the first `kept` units of an order. Units are elements by default."""
    mask = torch.zeros(len(order), dtype=torch.bool)
    mask[order[:kept]] = True
    return mask if partition is None else mask[partition]


def observed_inputs(
    model: nn.Module | PrunableModel, index: int, name: str, text: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the inputs `(N, in)` of an output projection on all batches, float64, and the tokens' weights `(N,)`.

    A weight is 1 / mean square of the residual stream after the attention, and if a norm follows the block, also
    1 / mean square of the block's output.
    """
    prunable = model if isinstance(model, PrunableModel) else PrunableModel.of(model)
    family, layer = prunable.family, prunable.layers[index]
    block = prunable.shape.blocks[index][name]
    paths = [block.output_path, family.residual, *([block.post_norm] if block.post_norm else [])]
    recorded: list[list[Tensor]] = [[] for _ in paths]
    handles = [
        layer.get_submodule(path).register_forward_pre_hook(
            lambda _, args, into=into: into.append(args[0].flatten(0, -2).double())
        )
        for path, into in zip(paths, recorded, strict=True)
    ]
    with torch.no_grad():
        for tokens in text or batches():
            prunable.module(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    inputs, *divisors = map(torch.cat, recorded)
    weights = torch.ones(len(inputs), dtype=torch.float64)
    for states in divisors:
        weights = weights / states.square().mean(-1)
    return inputs, weights


def error_root_of(model: nn.Module, index: int, name: str, root: Tensor) -> Tensor:
    """Return R of a block's output, given that of the residual stream: a norm in between multiplies with its weight."""
    prunable = PrunableModel.of(model)
    path, root = prunable.shape.blocks[index][name].post_norm, root.double()
    if path is None:
        return root
    return root @ torch.diag(prunable.family.norm_weight(prunable.layers[index].get_submodule(path)).double())


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
