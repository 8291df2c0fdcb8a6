"""The sizes that the estimates are computed from: of the model (which may be on the meta device), recipe and text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor, nn

from pgprune_cli.core.grid import unit_count, unit_multiple
from pgprune_cli.core.space import BLOCKS_OF
from pgprune_cli.model.families.adapter import Block
from pgprune_cli.model.prunable import Partitions, PrunableModel
from pgprune_cli.recipe.schema import FITTED, Recipe
from pgprune_cli.repair.last_layers import fitted_layers
from pgprune_cli.repair.width_table import width_step
from pgprune_cli.scores.metrics import CALIBRATED, NEEDS
from pgprune_cli.scores.statistics import Statistic
from pgprune_cli.search.budget import estimated_units
from pgprune_cli.search.costs import flops


@dataclass(frozen=True)
class Texts:
    """What a search reads, in batches of tokens `(B, T)`; only their shapes count.

    scoring: read by the metric; table: by the width table; repair: by the repair; step: by one step; heldout: by one
    evaluation on held-out text; sampled: those windows of the repair that the dense model writes.
    """

    scoring: Sequence[Tensor]
    table: Sequence[Tensor]
    repair: Sequence[Tensor]
    step: Tensor
    heldout: Tensor
    sampled: Sequence[Tensor] = ()


@dataclass(frozen=True)
class BlockSizes:
    """One block of one layer.

    block: where its projections are; elements: how many it has; units: of the search; inputs, outputs: widths of its
    output projection; inner: output widths of its other projections, for one token; nbytes: of its weights, in the
    model's dtype; keep_fraction: what the recipe keeps of it; width_step: distance between the widths in the table;
    experts: how many output projections it has, of `inputs` each, of which a token uses experts_per_token.
    """

    block: Block
    elements: int
    units: int
    inputs: int
    outputs: int
    inner: tuple[int, ...]
    nbytes: int
    keep_fraction: float
    width_step: int
    experts: int = 1
    experts_per_token: int = 1

    @property
    def largest(self) -> int:
        """Weights of its largest projection."""
        return max(*self.inner, self.inputs) * self.outputs


class Sizes:
    """The sizes of a recipe's model, and what the search does with it."""

    def __init__(self, model: PrunableModel, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        self.dtype: torch.dtype = next(model.module.parameters()).dtype
        self.vocabulary, self.hidden = model.head.weight.shape
        self.layers = model.shape.layers
        self._flops_per_token: dict[int, list[int]] = {}

    @property
    def parameters(self) -> int:
        """Parameters of the model. The scales of rounded weights do not count."""
        named = self.model.module.named_parameters()
        return sum(parameter.numel() for name, parameter in named if not name.endswith(".scale"))

    @cached_property
    def partitions(self) -> Partitions:
        """The units of the blocks that the recipe searches."""
        return estimated_units(self.recipe, self.model.shape)

    @cached_property
    def multiples(self) -> dict[str, int]:
        """By block name, what its widths are multiples of."""
        return {"ffn": self.recipe.budget.ffn_multiple}

    @cached_property
    def blocks(self) -> list[BlockSizes]:
        """All blocks, layer by layer. Every block is assumed to keep what the budget keeps of all."""
        pruned = {block for family in self.recipe.units.families for block in BLOCKS_OF[family]}
        kept = 1.0 - self.recipe.budget.sparsity
        blocks = []
        for index, layer in enumerate(self.model.layers):
            for block in self.model.family.blocks_of(layer):
                partition = self.partitions.get((index, block.name))
                units = 1 if partition is None else unit_count(partition)
                grid = self.model.shape.grids[block.name][index]
                fraction = kept if block.name in pruned else 1.0
                step = width_step(units, unit_multiple(grid, self.multiples.get(block.name, 1)))
                used = self.model.family.groups_per_token(layer, block)
                sizes = self._linears if used is None else self._experts
                blocks.append(BlockSizes(block, grid.elements, units, *sizes(layer, block), fraction, step))
                if used is not None:
                    blocks[-1] = replace(blocks[-1], experts=grid.groups, experts_per_token=used)
        return blocks

    def _linears(self, layer: nn.Module, block: Block) -> tuple[int, int, tuple[int, ...], int]:
        """Return inputs, outputs, inner and nbytes of a block of linear layers."""
        *inner, output = linears = block.linears(layer)
        widths = tuple(linear.out_features for linear in inner)
        return output.in_features, output.out_features, widths, sum(linear.weight.nbytes for linear in linears)

    def _experts(self, layer: nn.Module, block: Block) -> tuple[int, int, tuple[int, ...], int]:
        """Return the same of a block of experts."""
        family, module = self.model.family, layer.get_submodule(block.module)
        channels, used = family.grid(layer, block).members, family.groups_per_token(layer, block) or 1
        nbytes = sum(module.get_parameter(tensor.name).nbytes for tensor in family.unit_tensors(layer, block))
        return channels, self.hidden, (2 * channels,) * used, nbytes

    def flops_per_token(self, context: int) -> list[int]:
        """Return the FLOPs of every dense block for one token of a window of `context`."""
        if context not in self._flops_per_token:
            self._flops_per_token[context] = flops_per_token(self.model, context)
        return self._flops_per_token[context]

    @property
    def statistic(self) -> Statistic | None:
        """The statistic that the metric collects over text."""
        return NEEDS.get(self.recipe.scores.metric)

    @property
    def scores_on_text(self) -> bool:
        """Whether the metric reads calibration text."""
        return self.recipe.scores.metric in CALIBRATED

    @property
    def has_table(self) -> bool:
        """Whether the search is over widths."""
        return self.recipe.search.policy == "widths"

    @property
    def solves(self) -> bool:
        """Whether repaired projections are solved for."""
        return self.recipe.repair.method in FITTED

    @property
    def fits_blocks(self) -> bool:
        """Whether whole blocks are fitted after that. Experts are not."""
        return self.recipe.repair.fits_blocks

    @property
    def last_layers(self) -> list[list[BlockSizes]]:
        """The blocks of each layer that is fitted to the dense model's predictions in the end."""
        last = fitted_layers(self.model, self.recipe.repair.fitted_last_layers)
        blocks = iter(self.blocks)
        layers = [list(islice(blocks, len(self.model.family.blocks_of(layer)))) for layer in self.model.layers]
        return layers[last.start : last.stop]

    @property
    def last_blocks(self) -> list[BlockSizes]:
        """All blocks of these layers."""
        return [block for layer in self.last_layers for block in layer]

    @property
    def repairs(self) -> bool:
        """Whether the kept weights are repaired."""
        return self.recipe.repair.method != "none"


def flops_per_token(model: PrunableModel, context: int) -> list[int]:
    """Return the FLOPs of every block of a model, layer by layer, for one token of a window of `context`."""
    costs, grids = flops(model, context), model.shape.grids
    return [
        costs[block.name][index].of_whole(grids[block.name][index])
        for index, layer in enumerate(model.layers)
        for block in model.family.blocks_of(layer)
    ]


def tokens_in(batches: Sequence[Tensor]) -> int:
    """Return the number of tokens in batches."""
    return sum(batch.numel() for batch in batches)
