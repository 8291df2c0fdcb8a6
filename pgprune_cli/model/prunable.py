"""A model that can be pruned: the transformers model, and what every part of pgprune needs to know about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pgprune_cli.core.grid import NO_ELEMENTS, Grid, GridCost, Partition, one_unit_per_group, unit_costs, unit_count
from pgprune_cli.core.space import BLOCKS_OF, WHOLE_FAMILIES, Family, MaskSpace
from pgprune_cli.model.families import family_of
from pgprune_cli.model.families.adapter import Block, ModelFamily, tensor_shape
from pgprune_cli.model.families.layout import check_layout
from pgprune_cli.model.masks import LayerMask, ModelMask
from pgprune_cli.model.unit_tensors import UnitTensor

BlockCosts = Mapping[str, tuple[GridCost, ...]]
"""What the elements and groups of a block cost, by block name, layer by layer: whole numbers of whatever is counted."""

Partitions = Mapping[tuple[int, str], Partition]
"""By (layer, block name), the unit of every element."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a dense model that pruning needs.

    blocks: the blocks that each layer has, by name; grids: the grid of every block, by block name, layer by layer;
    parameters: what their elements and groups cost in parameters.
    """

    family: ModelFamily
    blocks: tuple[Mapping[str, Block], ...]
    grids: Mapping[str, tuple[Grid, ...]]
    parameters: BlockCosts

    @classmethod
    def of(cls, family: ModelFamily, layers: Sequence[nn.Module]) -> Shape:
        """Read the shape off decoder layers (layers on the meta device will do)."""
        blocks = tuple({block.name: block for block in family.blocks_of(layer)} for layer in layers)
        names = [block.name for block in family.blocks]
        pairs = list(zip(layers, blocks, strict=True))
        return cls(
            family,
            blocks,
            {
                name: tuple(family.grid(layer, has[name]) if name in has else NO_ELEMENTS for layer, has in pairs)
                for name in names
            },
            {
                name: tuple(
                    _parameter_cost(family, layer, has[name]) if name in has else GridCost(0) for layer, has in pairs
                )
                for name in names
            },
        )

    @property
    def layers(self) -> int:
        """How many decoder layers there are."""
        return len(next(iter(self.grids.values())))

    def is_recurrent(self, layer: int) -> bool:
        """Return whether the attention of a layer has a state of constant size in place of a KV cache."""
        return self.family.recurrent is not None and self.family.recurrent in self.blocks[layer].values()

    @property
    def elements(self) -> dict[str, tuple[int, ...]]:
        """The number of elements of every block, by block name, layer by layer."""
        return {name: tuple(grid.elements for grid in grids) for name, grids in self.grids.items()}

    @property
    def unit_counts(self) -> dict[str, list[int]]:
        """The number of units of a unit search in every layer, by block name: whole groups, or single elements."""
        return {name: [unit_count(one_unit_per_group(grid)) for grid in grids] for name, grids in self.grids.items()}

    def space(self, families: Sequence[str], partitions: Partitions, costs: BlockCosts | None = None) -> MaskSpace:
        """Return the units of the named families (attention, ffn, attention-block, ffn-block, layer) and their costs.

        partitions: the units of every block that is not a unit as a whole; costs: parameters by default. A whole block
        or layer costs the sum of its units.
        """
        costs = costs or self.parameters
        members = []
        for name in families:
            blocks = BLOCKS_OF[name]
            if name in WHOLE_FAMILIES:
                sums = [
                    sum(costs[block][layer].of_whole(self.grids[block][layer]) for block in blocks)
                    for layer in range(self.layers)
                ]
                members.append(Family(name, tuple(int(cost > 0) for cost in sums), tuple(sums)))
            else:
                members.append(self._family(name, [partitions[layer, name] for layer in range(self.layers)], costs))
        return MaskSpace(tuple(members))

    def _family(self, block: str, partitions: Sequence[Partition], costs: BlockCosts) -> Family:
        by_layer = [
            unit_costs(partition, grid, cost)
            for partition, grid, cost in zip(partitions, self.grids[block], costs[block], strict=True)
        ]
        counts = tuple(len(layer_costs) for layer_costs in by_layer)
        return Family(block, counts, tuple(c[0] if len(set(c)) == 1 else tuple(c) for c in by_layer))

    def model_mask(self, space: MaskSpace, mask: Tensor, partitions: Partitions) -> ModelMask:
        """Return a mask `(n,)` over the space's units as masks of every layer. Blocks outside the space are kept."""
        masks = {
            name: [torch.ones(count, dtype=torch.bool) for count in counts] for name, counts in self.elements.items()
        }
        for family in space.families:
            for index, part in enumerate(space.per_layer(mask, family.name)):
                for block in BLOCKS_OF[family.name]:
                    by_element = part if family.name in WHOLE_FAMILIES else part[partitions[index, block]]
                    masks[block][index] = masks[block][index] & by_element
        return tuple(
            LayerMask(**{name: layer_masks[index] for name, layer_masks in masks.items()})
            for index in range(self.layers)
        )

    def all_kept(self) -> ModelMask:
        """Return the mask that keeps every element."""
        counts = self.elements
        return tuple(
            LayerMask(**{name: torch.ones(by_layer[layer], dtype=torch.bool) for name, by_layer in counts.items()})
            for layer in range(self.layers)
        )

    def kept(self, model_mask: ModelMask) -> list[dict[str, tuple[int, int]]]:
        """Return how many (groups, members) every layer keeps under a regular mask, by block name."""
        return [
            {name: grids[index].kept(layer.of(name)) for name, grids in self.grids.items()}
            for index, layer in enumerate(model_mask)
        ]

    def cost(self, costs: BlockCosts, model_mask: ModelMask | None = None) -> int:
        """Return what a mask keeps of all blocks, or what the dense model has, in the measure of `costs`."""
        total = 0
        for name, grids in self.grids.items():
            for index, (grid, cost) in enumerate(zip(grids, costs[name], strict=True)):
                total += cost.of_whole(grid) if model_mask is None else cost.of_mask(grid, model_mask[index].of(name))
        return total


@dataclass(frozen=True)
class PrunableModel:
    """A causal language model whose family pgprune knows, ready for forward passes.

    module: the transformers model; layers: its decoder layers; embedding, final_norm, head, decoder: its parts; shape:
    the sizes of the dense model. Weights may be on the meta device, where only shapes count.
    """

    module: nn.Module
    family: ModelFamily
    shape: Shape
    layers: nn.ModuleList
    embedding: nn.Embedding
    final_norm: nn.Module
    head: nn.Linear
    decoder: nn.Module

    @classmethod
    def of(cls, module: nn.Module) -> PrunableModel:
        """Find the parts of a transformers causal model.

        Raises UserError for a family that is not supported, or layers that its adapter does not describe.
        """
        causal: Any = module
        family = family_of(causal.config.model_type)
        layers = module.get_submodule(family.layers)
        embedding = module.get_submodule(family.embedding)
        head = module.get_submodule(family.head)
        assert isinstance(layers, nn.ModuleList)
        assert isinstance(embedding, nn.Embedding)
        assert isinstance(head, nn.Linear)
        check_layout(family, causal.config.model_type, list(layers))
        shape = Shape.of(family, list(layers))
        final_norm = module.get_submodule(family.final_norm)
        return cls(module, family, shape, layers, embedding, final_norm, head, causal.get_decoder())

    @property
    def config(self) -> Any:
        """The transformers config."""
        causal: Any = self.module
        return causal.config

    @property
    def device(self) -> torch.device:
        """The device that tokens are sent to."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden states."""
        return self.embedding.weight.dtype


def _parameter_cost(family: ModelFamily, layer: nn.Module, block: Block) -> GridCost:
    """Count the parameters of an element and of a group: their rows in every tensor of the block."""
    return grid_cost(family.grid(layer, block), layer.get_submodule(block.module), family.unit_tensors(layer, block))


def grid_cost(
    grid: Grid, module: nn.Module, tensors: Sequence[UnitTensor], groups_per_token: int | None = None
) -> GridCost:
    """Return how many parameters an element has in these tensors of a block, how many a group shares, and a member.

    groups_per_token: how many groups one token uses. If given, only their members are counted, as for one token.
    """
    element = group = member = 0
    routed = {tensor.module for tensor in tensors if tensor.stacked}
    for tensor in tensors:
        shape = tensor_shape(module, tensor.name)
        per_row = shape.numel() // shape[tensor.axis] // (shape[0] if tensor.stacked else 1)
        for part in tensor.parts:
            rows = part.width * per_row
            if groups_per_token is not None and tensor.module in routed:
                member += groups_per_token * rows * tensor.stacked  # what a group shares counts the same at any width
            elif tensor.stacked or part.runs == grid.elements:
                element += rows
            else:
                group += rows
    return GridCost(element, group, member)


def unit_tensors(model: PrunableModel) -> dict[str, UnitTensor]:
    """Return every tensor whose rows belong to elements, by its name in the causal model."""
    family = model.family
    return {
        f"{family.layers}.{index}.{block.module}.{tensor.name}": tensor
        for index, layer in enumerate(model.layers)
        for block in family.blocks_of(layer)
        for tensor in family.unit_tensors(layer, block)
    }
