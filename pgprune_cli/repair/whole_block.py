"""All kept weights of a dense block, by name: what a fit starts from, and what it returns."""

from __future__ import annotations

from torch import Tensor, nn

from pgprune_cli.model.families.adapter import Block, ModelFamily
from pgprune_cli.model.masks import RepairedBlock
from pgprune_cli.model.unit_tensors import KeptElements, gather
from pgprune_cli.repair.training import Weights


def kept_weights(
    family: ModelFamily, layer: nn.Module, block: Block, mask: Tensor, repaired: RepairedBlock
) -> dict[str, Tensor]:
    """Return the weights and inner biases of a block under a mask `(elements,)`, by their names inside its module.

    Refitted ones are those of `repaired`, all others are gathered from the dense block. A rounded weight is in the
    model's dtype.
    """
    module, kept = layer.get_submodule(block.module), KeptElements(mask)
    *inner, output = family.unit_tensors(layer, block)
    weights = {}
    for tensor in inner:
        if tensor.name in repaired.inner:
            weights[tensor.name] = repaired.inner[tensor.name]
        else:
            dense: Tensor = getattr(module.get_submodule(tensor.module), tensor.key)
            weights[tensor.name] = gather(dense.data, tensor, kept)
    return {**weights, output.name: repaired.weight}


def block_of(
    family: ModelFamily, layer: nn.Module, block: Block, weights: Weights, bias: Tensor | None
) -> RepairedBlock:
    """Return the repaired block with these weights. bias: of its output."""
    *inner, output = family.unit_tensors(layer, block)
    return RepairedBlock(weights[output.name], bias, {tensor.name: weights[tensor.name] for tensor in inner})
