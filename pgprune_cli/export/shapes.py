"""Which layers an export writes, and how wide each block is there.

Layers without any kept unit are dropped. If a runtime or a device needs more units than the decision keeps, the block
is padded with units of the base model whose output columns are zero. The model's outputs do not change, and this holds
for repaired blocks too, whose repaired weights exist only for the kept units. Padding costs as much memory and time as
real units, and is counted as kept. `budget.ffn_multiple` in a recipe searches for real units instead. The other rows of
the padding are those of the base model, so fine-tuning can make use of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import Literal

import torch
from torch import Tensor

from pgprune_cli.errors import UserError
from pgprune_cli.model.families.adapter import gather_units
from pgprune_cli.model.masks import LayerMask, ModelMask, columns_of
from pgprune_cli.model.prunable import UnitCosts
from pgprune_cli.run.layout import DECISION_RECORD


@dataclass(frozen=True)
class ShapeRequirements:
    """What a runtime, a format or the user requires of the shapes beyond what the decision keeps.

    attention: which of the written layers must have at least one KV head; ffn: which must have at least one channel.
    pad_kv_heads, pad_ffn: each block has a multiple of that many KV heads or channels, or all of the base's, or none.
    """

    attention: Literal["any", "first", "every"] = "any"
    ffn: Literal["any", "every"] = "any"
    pad_kv_heads: int = 1
    pad_ffn: int = 1

    def combined(self, other: ShapeRequirements) -> ShapeRequirements:
        """Return the weakest requirements that imply both."""
        return ShapeRequirements(
            max(self.attention, other.attention, key=("any", "first", "every").index),
            max(self.ffn, other.ffn, key=("any", "every").index),
            lcm(self.pad_kv_heads, other.pad_kv_heads),
            lcm(self.pad_ffn, other.pad_ffn),
        )


@dataclass(frozen=True)
class RuntimeShapes:
    """The shapes of an export.

    layers: indices of the base model's layers that are written, in order. kept: what the decision keeps in *every*
    layer of the base model. written: what is written of every layer, which is the kept units and the padding (nothing
    for a layer that is not in `layers`).
    """

    layers: tuple[int, ...]
    kept: ModelMask
    written: ModelMask

    @property
    def padded(self) -> bool:
        """True if any block has padding."""
        return _counts(self.kept) != _counts(self.written)

    def sizes(self) -> list[dict[str, int]]:
        """Return how many units each block of the written layers has, by block name, layer after layer."""
        counts = _counts(self.written)
        return [counts[layer] for layer in self.layers]

    @property
    def uniform(self) -> bool:
        """True if all written layers have the same sizes, and no block is missing."""
        sizes = self.sizes()
        return all(size == sizes[0] for size in sizes) and all(sizes[0].values())

    def sparsity(self, costs: UnitCosts) -> float:
        """Return the fraction of the cost of the base model's units that is not written. Padding counts as kept."""
        kept = total = 0
        for block, block_costs in costs.items():
            for layer, cost in zip(self.written, block_costs, strict=True):
                kept += int(layer.of(block).sum()) * cost
                total += len(layer.of(block)) * cost
        return 1 - kept / total


def runtime_shapes(model_mask: ModelMask, requirements: ShapeRequirements) -> RuntimeShapes:
    """Return the shapes with the least padding that meets the requirements.

    The padding of a block is its first removed units; which ones they are does not change the logits. Raises UserError
    if the decision keeps nothing.
    """
    layers = tuple(i for i, layer in enumerate(model_mask) if layer.attention.any() or layer.ffn.any())
    if not layers:
        raise UserError(
            f"{DECISION_RECORD}: keeps no units, so there is no model to write. Search at a lower sparsity."
        )
    written = list(model_mask)
    for index in layers:
        needs_head = requirements.attention == "every" or (requirements.attention == "first" and index == layers[0])
        written[index] = LayerMask(
            _padded(model_mask[index].attention, int(needs_head), requirements.pad_kv_heads),
            _padded(model_mask[index].ffn, int(requirements.ffn == "every"), requirements.pad_ffn),
        )
    return RuntimeShapes(layers, model_mask, tuple(written))


def _counts(model_mask: ModelMask) -> list[dict[str, int]]:
    """Return how many units a mask keeps in each layer, by block name."""
    return [{block: int(mask.sum()) for block, mask in vars(layer).items()} for layer in model_mask]


def _padded(mask: Tensor, minimum: int, multiple: int) -> Tensor:
    """Return the mask `(units,)` with units added: to at least `minimum`, then to a multiple, at most all of them."""
    kept = int(mask.sum())
    size = min(-(-max(kept, minimum) // multiple) * multiple, len(mask))
    padded = mask.clone()
    padded[(~mask).nonzero().squeeze(1)[: size - kept]] = True
    return padded


def output_columns(dense: Tensor, kept: Tensor, written: Tensor, repaired: Tensor | None) -> Tensor:
    """Return the output projection `(hidden, written inputs)` of a block, with zeros in the columns of the padding.

    dense: the base model's `(hidden, inputs)`; kept, written: masks `(units,)`, the first within the second; repaired:
    `(hidden, kept inputs)`, used in place of the dense columns.
    """
    units = len(kept)
    if repaired is None:
        repaired = gather_units(dense, 1, kept.nonzero().squeeze(1), units)
    if torch.equal(kept, written):
        return repaired
    width = dense.shape[1] // units
    columns = repaired.new_zeros(dense.shape[0], int(written.sum()) * width)
    columns[:, columns_of(kept[written].nonzero().squeeze(1), width)] = repaired
    return columns
