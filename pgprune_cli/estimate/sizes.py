"""What the estimates are made of: shapes of the model, which may be on the meta device, of the recipe and its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from pgprune_cli.model.prunable import Shape
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.repair.width_table import width_step
from pgprune_cli.scores.metrics import CALIBRATED, NEEDS
from pgprune_cli.scores.statistics import Statistic
from pgprune_cli.search.costs import flops


@dataclass(frozen=True)
class Texts:
    """What a search reads, in batches of tokens `(B, T)` (on the meta device will do: only their shapes count).

    scoring: of the metric; fitting: of the width table and the repair; step: one step's; heldout: of one evaluation.
    """

    scoring: Sequence[Tensor]
    fitting: Sequence[Tensor]
    step: Tensor
    heldout: Tensor


@dataclass(frozen=True)
class Block:
    """One block of one layer.

    name: attention or ffn; units: how many; inputs, outputs: of its output projection; inner: the widths of what its
    other projections put out; nbytes: of its weights, in the model's dtype; keep: the fraction that the recipe
    keeps of it; level: the step between the widths of the table.
    """

    name: str
    units: int
    inputs: int
    outputs: int
    inner: tuple[int, ...]
    nbytes: int
    keep: float
    level: int

    @property
    def largest(self) -> int:
        """The weights of its largest projection."""
        return max(*self.inner, self.inputs) * self.outputs


class Sizes:
    """Of a recipe's model, and what its search does with it. Raises UserError for a model that cannot be pruned."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        self.shape = Shape.of(model)
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self.vocabulary, self.hidden = model.get_output_embeddings().weight.shape
        self.layers = len(self.shape.channels)

    @property
    def parameters(self) -> int:
        """Of the model; the scales of rounded weights are none."""
        named = self.model.named_parameters()
        return sum(parameter.numel() for name, parameter in named if not name.endswith(".scale"))

    @cached_property
    def blocks(self) -> list[Block]:
        """Layer by layer, attention first. Every block is taken to keep what its family keeps."""
        families, kept = self.recipe.units.families, 1.0 - self.recipe.budget.sparsity
        found = []
        layers = self.model.get_submodule(self.shape.spec.layers)
        assert isinstance(layers, nn.ModuleList)
        for index, layer in enumerate(layers):
            for name, block in self.shape.spec.blocks():
                units = (self.shape.kv_heads if name == "attention" else self.shape.channels)[index]
                module = layer.get_submodule(block.module)
                linears = [module.get_submodule(projection.name) for projection in block.projections]
                pruned = "layer" in families or any(family.removesuffix("-block") == name for family in families)
                found.append(
                    Block(
                        name,
                        units,
                        linears[-1].in_features,
                        linears[-1].out_features,
                        tuple(linear.out_features for linear in linears[:-1]),
                        sum(linear.weight.nbytes for linear in linears),
                        kept if pruned else 1.0,
                        width_step(units, self.recipe.budget.ffn_multiple if name == "ffn" else 1),
                    )
                )
        return found

    def flops_of_token(self, context: int) -> list[int]:
        """FLOPs of every block, dense, for one token of a window of `context`."""
        costs = flops(self.model, context)
        in_order = (cost for pair in zip(costs.attention, costs.ffn, strict=True) for cost in pair)
        return [block.units * cost for block, cost in zip(self.blocks, in_order, strict=True)]

    @property
    def statistic(self) -> Statistic | None:
        """What the metric collects over text."""
        return NEEDS.get(self.recipe.scores.metric)

    @property
    def scores_on_text(self) -> bool:
        return self.recipe.scores.metric in CALIBRATED

    @property
    def has_table(self) -> bool:
        """Whether the search is over widths."""
        return self.recipe.search.policy == "widths"

    @property
    def solves(self) -> bool:
        """Whether repaired projections are solved for."""
        return self.recipe.repair.method.startswith("least-squares")

    @property
    def repairs(self) -> bool:
        return self.recipe.repair.method != "none"


def tokens_in(batches: Sequence[Tensor]) -> int:
    return sum(batch.numel() for batch in batches)
