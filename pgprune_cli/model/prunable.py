"""A model that can be pruned: the transformers model, and what every part of pgprune needs to know about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pgprune_cli.core.space import BLOCKS_OF, WHOLE_FAMILIES, Family, MaskSpace
from pgprune_cli.model.families import family_of
from pgprune_cli.model.families.adapter import Block, ModelFamily
from pgprune_cli.model.masks import LayerMask, ModelMask

UnitCosts = Mapping[str, tuple[int, ...]]
"""What one unit costs, by block name, layer by layer: whole numbers of whatever is counted."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a dense model that pruning needs.

    units: how many units each layer has, by block name; parameters: how many parameters one of them has.
    """

    family: ModelFamily
    units: Mapping[str, tuple[int, ...]]
    parameters: UnitCosts

    @classmethod
    def of(cls, family: ModelFamily, layers: Sequence[nn.Module]) -> Shape:
        """Read the shape off decoder layers (layers on the meta device will do)."""
        counts = [family.units(layer) for layer in layers]
        return cls(
            family,
            {block.name: tuple(count[block.name] for count in counts) for block in family.blocks},
            {
                block.name: tuple(
                    _unit_parameters(layer, block, count[block.name])
                    for layer, count in zip(layers, counts, strict=True)
                )
                for block in family.blocks
            },
        )

    @property
    def layers(self) -> int:
        """How many decoder layers there are."""
        return len(next(iter(self.units.values())))

    def space(self, families: Sequence[str], costs: UnitCosts | None = None) -> MaskSpace:
        """Return the units of the named families (attention, ffn, attention-block, ffn-block, layer) and their costs.

        costs: per unit, by block name; parameters by default. A whole block or layer costs the sum of its units.
        """
        costs = costs or self.parameters
        members = []
        for name in families:
            blocks = BLOCKS_OF[name]
            if name in WHOLE_FAMILIES:
                sums = [
                    sum(self.units[block][layer] * costs[block][layer] for block in blocks)
                    for layer in range(self.layers)
                ]
                members.append(Family(name, (1,) * self.layers, tuple(sums)))
            else:
                members.append(Family(name, self.units[blocks[0]], costs[blocks[0]]))
        return MaskSpace(tuple(members))

    def model_mask(self, space: MaskSpace, mask: Tensor) -> ModelMask:
        """Return a mask `(n,)` over the space's units as masks of every layer. Blocks outside the space are kept."""
        masks = {name: [torch.ones(count, dtype=torch.bool) for count in counts] for name, counts in self.units.items()}
        for family in space.families:
            for index, part in enumerate(space.per_layer(mask, family.name)):
                for block in BLOCKS_OF[family.name]:
                    masks[block][index] = masks[block][index] & part
        return tuple(
            LayerMask(**{name: layer_masks[index] for name, layer_masks in masks.items()})
            for index in range(self.layers)
        )


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
        """Find the parts of a transformers causal model. Raises UserError for a family that is not supported."""
        causal: Any = module
        family = family_of(causal.config.model_type)
        layers = module.get_submodule(family.layers)
        embedding = module.get_submodule(family.embedding)
        head = module.get_submodule(family.head)
        assert isinstance(layers, nn.ModuleList)
        assert isinstance(embedding, nn.Embedding)
        assert isinstance(head, nn.Linear)
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


def _unit_parameters(layer: nn.Module, block: Block, units: int) -> int:
    """Count the parameters of one unit: its share of every weight, and of the biases along the same axis."""
    total = 0
    for projection, linear in zip(block.projections, block.linears(layer), strict=True):
        total += linear.in_features * linear.out_features
        if linear.bias is not None and projection.axis == 0:
            total += linear.bias.numel()
    return total // units
