"""Compares decoder layers with what their adapter describes, so that a layout that it does not know is not pruned."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pgprune_cli.errors import UserError
from pgprune_cli.model.families.adapter import Block, ModelFamily, tensor_shape
from pgprune_cli.model.unit_tensors import UnitTensor


def check_layout(family: ModelFamily, model_type: str, layers: Sequence[nn.Module]) -> None:
    """Raise UserError if a layer lacks what its adapter describes, or has weights that the adapter does not know."""
    for index, layer in enumerate(layers):
        if fault := _fault(family, layer):
            known = " and ".join(f"{block.module} ({', '.join(block.projections)})" for block in family.kinds)
            raise UserError(
                f"layer {index} of this {model_type} {fault}. pgprune prunes layers that consist of {known}."
            )


def _fault(family: ModelFamily, layer: nn.Module) -> str:
    """Return how a layer differs from what its adapter describes, "" if it does not."""
    known: set[str] = set()
    blocks: list[str] = []
    for block in family.blocks_of(layer):
        try:
            tensors = family.unit_tensors(layer, block)
        except (AttributeError, AssertionError) as error:  # a module is missing, or is of another kind
            return f"has another {block.module} ({error})"
        if fault := _wrong_shape(layer.get_submodule(block.module), block, tensors):
            return fault
        known.update(f"{block.module}.{tensor.name}".rpartition(".")[0] for tensor in tensors)
        blocks += block.tensor_prefixes()
    for name, weight in layer.named_parameters():
        is_shared = weight.dim() < 2 and name.startswith(tuple(blocks))  # a norm, for example
        if name.rpartition(".")[0] not in known and not is_shared:
            return f"has the weight {name}, which is unknown"
    return ""


def _wrong_shape(module: nn.Module, block: Block, tensors: Sequence[UnitTensor]) -> str:
    """Return which tensor of a block has not as many rows as its adapter describes, "" if all have."""
    for tensor in tensors:
        found, rows = tensor_shape(module, tensor.name)[tensor.axis], sum(part.rows for part in tensor.parts)
        if found != rows:
            return f"has {found} rows in {block.module}.{tensor.name} instead of {rows}"
    return ""
