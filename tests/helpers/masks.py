"""Regular masks of the tiny models, tokens to evaluate them on, and repaired blocks to evaluate them with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from helpers.experts import WIDTH_MULTIPLE, mask_experts
from helpers.models import VOCABULARY
from pgprune_cli.core.grid import Grid, first_elements
from pgprune_cli.model.families import family_of
from pgprune_cli.model.families.adapter import Block
from pgprune_cli.model.masks import LayerMask, ModelMask, RepairedBlock, RepairedBlocks
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.unit_tensors import UnitTensor, kept_shape

KV_HEADS, CHANNELS, LAYERS = 4, 24, 4

Count = int | tuple[int, int]
"""How much of a block is kept: whole KV heads or channels, or (groups, members of each group)."""


def random_tokens(seed: int = 0, rows: int = 3, length: int = 24) -> Tensor:
    """Return token windows `(rows, length)`, by default longer than the sliding window of the tiny Mistral."""
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def grids_of(model: nn.Module, block: str) -> tuple[Grid, ...]:
    """Return the grid of a block in every layer of a transformers model."""
    return PrunableModel.of(model).shape.grids[block]


def is_refused(model: nn.Module, block: str) -> bool:
    """Return whether a block of this model can be removed only as a whole."""
    model_type = model.config.model_type
    return bool(family_of(model_type).refusal(model_type, block))


def size_of(grid: Grid, block: str, count: Count, whole_only: bool = False) -> tuple[int, int]:
    """Return the (groups, members) that a count means. Experts are all kept, with their share of the channels."""
    groups, members = count if isinstance(count, tuple) else (count, count)
    if not groups or not members:
        return 0, 0
    if whole_only:
        return grid.groups, grid.members
    if not isinstance(count, tuple):
        if block == "attention":
            members = grid.members
        else:
            groups = grid.groups
            members = count if grid.groups == 1 else -(-count * grid.members // CHANNELS)
    if grid.separate:
        members = -(-members // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    return min(max(groups, grid.min_groups), grid.groups), min(members, grid.members)


def random_elements(grid: Grid, groups: int, members: int, generator: torch.Generator) -> Tensor:
    """Return a random regular mask `(elements,)` that keeps `members` members of `groups` groups."""
    mask = torch.zeros(grid.groups, grid.members, dtype=torch.bool)
    for group in torch.randperm(grid.groups, generator=generator)[:groups].tolist():
        mask[group, torch.randperm(grid.members, generator=generator)[:members]] = True
    return mask.flatten()


def draw(model: nn.Module, counts: Sequence[tuple[Count, Count]], seed: int = 3) -> ModelMask:
    """Return a random regular mask that keeps the given sizes of attention and FFN in each layer."""
    generator = torch.Generator().manual_seed(seed)
    return _masks(model, counts, lambda grid, *size: random_elements(grid, *size, generator))


def keep_first(model: nn.Module, counts: Sequence[tuple[Count, Count]]) -> ModelMask:
    """Return a regular mask that keeps the first elements, with the given sizes of attention and FFN in each layer."""
    return _masks(model, counts, first_elements)


def _masks(
    model: nn.Module, counts: Sequence[tuple[Count, Count]], choose: Callable[[Grid, int, int], Tensor]
) -> ModelMask:
    grids = PrunableModel.of(model).shape.grids
    layers = []
    for index, layer_counts in enumerate(counts):
        masks = []
        for block, count in zip(("attention", "ffn"), layer_counts, strict=True):
            grid = grids[block][index]
            masks.append(choose(grid, *size_of(grid, block, count, is_refused(model, block))))
        layers.append(LayerMask(*masks))
    return tuple(layers)


def random_mask(
    model: nn.Module, seed: int, empty_attention: tuple[int, ...] = (), empty_ffn: tuple[int, ...] = ()
) -> ModelMask:
    """Return a regular mask that keeps a random part of every block, except in the given layers."""
    generator = torch.Generator().manual_seed(seed)
    grids = PrunableModel.of(model).shape.grids
    layers = []
    for index in range(LAYERS):
        masks = []
        for block, empty in (("attention", empty_attention), ("ffn", empty_ffn)):
            grid = grids[block][index]
            groups = _random(max(grid.min_groups, 1), grid.groups - (grid.groups > grid.min_groups), generator)
            members = _random(1, grid.members - (grid.groups == 1 and grid.members > 1), generator)
            if grid.separate:
                members = -(-members // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
            if is_refused(model, block):
                groups, members = grid.groups, grid.members
            masks.append(random_elements(grid, groups * (index not in empty), members, generator))
        layers.append(LayerMask(*masks))
    return tuple(layers)


def _random(least: int, most: int, generator: torch.Generator) -> int:
    return int(torch.randint(least, most + 1, (), generator=generator))


def dense_mask(model: nn.Module) -> ModelMask:
    """Return the mask that keeps everything."""
    return keep_first(model, [((KV_HEADS, 1 << 20), (1 << 20, 1 << 20))] * len(grids_of(model, "ffn")))


def dense_except(model: nn.Module, index: int, attention: Count, ffn: Count) -> ModelMask:
    """Return a mask that keeps everything except in one layer, where only the last elements are kept."""
    layers = list(dense_mask(model))
    masks = []
    for block, count in (("attention", attention), ("ffn", ffn)):
        grid = grids_of(model, block)[index]
        masks.append(first_elements(grid, *size_of(grid, block, count, is_refused(model, block))).flip(0))
    layers[index] = LayerMask(*masks)
    return tuple(layers)


MODEL_MASKS: dict[str, Callable[[nn.Module], ModelMask]] = {
    "dense": dense_mask,
    "random": lambda model: random_mask(model, 0),
    "another random": lambda model: random_mask(model, 1),
    "empty attention": lambda model: random_mask(model, 2, empty_attention=(2,)),
    "empty ffn": lambda model: random_mask(model, 3, empty_ffn=(1,)),
    "an empty layer": lambda model: random_mask(model, 4, empty_attention=(2,), empty_ffn=(2,)),
    "layer 0 empty": lambda model: random_mask(model, 5, empty_attention=(0,), empty_ffn=(0,)),
    "the last layer empty": lambda model: random_mask(model, 6, empty_attention=(3,), empty_ffn=(3,)),
    "all empty": lambda model: random_mask(model, 7, empty_attention=(0, 1, 2, 3), empty_ffn=(0, 1, 2, 3)),
    "one channel left": lambda model: dense_except(model, 1, KV_HEADS, (1, 1)),
    "one KV head left": lambda model: dense_except(model, 0, 1, CHANNELS),
    "one query head per KV head": lambda model: dense_except(model, 2, (KV_HEADS, 1), CHANNELS),
    "one query head left": lambda model: dense_except(model, 3, (1, 1), CHANNELS),
}
"""Masks for every tiny model, by name."""


def is_dense(model_mask: ModelMask) -> bool:
    """Return whether a mask keeps everything."""
    return all(bool(layer.attention.all() and layer.ffn.all()) for layer in model_mask)


def same_masks(left: ModelMask, right: ModelMask) -> bool:
    """Return whether two masks keep the same elements."""
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a.attention, b.attention) and torch.equal(a.ffn, b.ffn) for a, b in pairs)


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the logits `(windows, tokens, vocabulary)` of a forward pass."""
    with torch.inference_mode():
        return model(input_ids=tokens, use_cache=False).logits


@contextmanager
def masked(model: nn.Module, model_mask: ModelMask) -> Iterator[nn.Module]:
    """Mask a dense model in the slow and obvious way: zero the inputs of the output projections of removed elements.

    A block that keeps nothing adds nothing, so its output bias is removed too.
    """
    prunable = PrunableModel.of(model)
    handles: list[Any] = []
    undo: list[Callable[[], None]] = []

    def zero_inputs(linear: nn.Module, mask: Tensor) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            values = inputs[0].clone()
            width = values.shape[-1] // len(mask)
            for element in (~mask).nonzero().flatten().tolist():
                values[..., element * width : (element + 1) * width] = 0.0
            return (values, *inputs[1:])

        handles.append(linear.register_forward_pre_hook(hook))

    def zero_output(block: nn.Module) -> None:
        def hook(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
            if isinstance(output, tuple):
                return (torch.zeros_like(output[0]), *output[1:])
            return torch.zeros_like(output)

        handles.append(block.register_forward_hook(hook))

    for layer, layer_mask in zip(prunable.layers, model_mask, strict=True):
        for block in prunable.family.blocks_of(layer):
            mask = layer_mask.of(block.name)
            if mask.any() and prunable.family.groups_per_token(layer, block) is not None:
                undo += mask_experts(layer, mask)
            elif mask.any():
                zero_inputs(layer.get_submodule(block.output_path), mask)
            else:
                zero_output(layer.get_submodule(block.module))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
        for step in undo:
            step()


def random_repair(model: nn.Module, model_mask: ModelMask, bias: bool) -> RepairedBlocks:
    """Return random refitted weights for every block that keeps at least one element, dense blocks included.

    Besides the output projection, every second other tensor is refitted, so that two layers refit each of them.
    """
    prunable = PrunableModel.of(model)
    generator, repaired = torch.Generator().manual_seed(0), {}
    for index, (layer, layer_mask) in enumerate(zip(prunable.layers, model_mask, strict=True)):
        for block in prunable.family.blocks_of(layer):
            mask = layer_mask.of(block.name)
            if not mask.any():
                continue
            *others, output = [
                (tensor.name, 0.3 * torch.randn(kept_shape(tensor, values.shape, mask), generator=generator))
                for tensor, values in _unit_tensors(prunable, layer, block)
            ]
            own = None
            if prunable.family.groups_per_token(layer, block) is None:
                linear = block.output_linear(layer)
                own = torch.randn(linear.out_features, generator=generator) if bias else linear.bias
            repaired[index, block.name] = RepairedBlock(output[1], own, dict(others[index % 2 :: 2]))
    return repaired


def _unit_tensors(prunable: PrunableModel, layer: nn.Module, block: Block) -> list[tuple[UnitTensor, Tensor]]:
    module = layer.get_submodule(block.module)
    return [(tensor, module.get_parameter(tensor.name)) for tensor in prunable.family.unit_tensors(layer, block)]


def repaired_by_hand(model: nn.Module, model_mask: ModelMask, repaired: RepairedBlocks) -> nn.Module:
    """Return a dense copy of a model with the refitted weights in the rows of the kept elements. To be `masked`."""
    copied = copy.deepcopy(model)
    prunable = PrunableModel.of(copied)
    for (index, name), own in repaired.items():
        block, layer = prunable.shape.blocks[index][name], prunable.layers[index]
        tensors = _unit_tensors(prunable, layer, block)
        for tensor, values in tensors:
            refitted = own.weight if tensor is tensors[-1][0] else own.inner.get(tensor.name)
            if refitted is not None:
                _put_rows(values, tensor, model_mask[index].of(name), refitted)
        if own.bias is not None:
            block.output_linear(layer).bias = nn.Parameter(own.bias.clone(), requires_grad=False)
    return copied


def _put_rows(dense: Tensor, tensor: UnitTensor, mask: Tensor, refitted: Tensor) -> None:
    """Write the refitted rows of the kept elements into a dense tensor, run by run."""
    if tensor.stacked:
        by_group = [(values, own) for values, own in zip(dense, mask.view(len(dense), -1), strict=True) if own.any()]
        for (values, own), rows in zip(by_group, refitted, strict=True):
            _put_rows(values, UnitTensor(tensor.name, tensor.axis - 1, tensor.parts), own, rows)
        return
    target, source = dense.movedim(tensor.axis, 0), refitted.movedim(tensor.axis, 0)
    place = taken = 0
    for part in tensor.parts:
        for run in mask.view(part.runs, -1).any(1).tolist():
            if run:
                target[place : place + part.width] = source[taken : taken + part.width]
                taken += part.width
            place += part.width
    assert (place, taken) == (len(target), len(source))
