"""A decision in the form in which runtimes can run it: which layers are written, and how wide each block is there.

Layers with neither heads nor channels are dropped. Where a runtime or a device asks for more than the decision keeps, a
block is padded with units of the base whose columns in the output projection become zeros. So the logits stay those of
the decision, for repaired blocks too, whose weights exist only for the kept units. The padding costs what real units
cost, and is counted as kept; a recipe's `budget.ffn_multiple` searches for real units instead. Fine-tuning can put the
padding to use, for its other rows are the base's.
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


@dataclass(frozen=True)
class Needs:
    """What is asked of the sizes beyond what the decision says.

    attention: which of the written layers must have a KV head at least; ffn: which of them a channel. A block has a
    multiple of `kv_multiple` KV heads or `ffn_multiple` channels, or all that the base has, or none.
    """

    attention: Literal["any", "first", "every"] = "any"
    ffn: Literal["any", "every"] = "any"
    kv_multiple: int = 1
    ffn_multiple: int = 1

    def and_of(self, other: Needs) -> Needs:
        """What meets both."""
        return Needs(
            max(self.attention, other.attention, key=("any", "first", "every").index),
            max(self.ffn, other.ffn, key=("any", "every").index),
            lcm(self.kv_multiple, other.kv_multiple),
            lcm(self.ffn_multiple, other.ffn_multiple),
        )


@dataclass(frozen=True)
class RuntimeShapes:
    """layers: the base's layers that are written, in order. kept and written: of *every* layer of the base, what the
    decision keeps and what is written, which is the same and the padding; nothing is written of layers not in `layers`.
    """

    layers: tuple[int, ...]
    kept: ModelMask
    written: ModelMask

    @property
    def padded(self) -> bool:
        return any(
            not torch.equal(kept.of(block), written.of(block))
            for kept, written in zip(self.kept, self.written, strict=True)
            for block in ("attention", "ffn")
        )

    def sizes(self) -> list[tuple[int, int]]:
        """KV heads and channels of the written layers in order."""
        return [(int(self.written[i].attention.sum()), int(self.written[i].ffn.sum())) for i in self.layers]

    @property
    def uniform(self) -> bool:
        """Whether all written layers have the same sizes, and both blocks."""
        sizes = self.sizes()
        return all(size == sizes[0] for size in sizes) and 0 not in sizes[0]

    def sparsity(self, costs: UnitCosts) -> float:
        """The fraction of what the base's units cost that is not written: the padding counts as kept."""
        kept = total = 0
        for block, block_costs in costs.items():
            for layer, cost in zip(self.written, block_costs, strict=True):
                kept += int(layer.of(block).sum()) * cost
                total += len(layer.of(block)) * cost
        return 1 - kept / total


def runtime_shapes(keep: ModelMask, needs: Needs) -> RuntimeShapes:
    """The least padding that meets the needs; which units pad is no matter for the logits: the first that are gone.

    Raises UserError where nothing is kept.
    """
    layers = tuple(i for i, layer in enumerate(keep) if layer.attention.any() or layer.ffn.any())
    if not layers:
        raise UserError("the decision keeps nothing of any layer; there is no model to write")
    written = list(keep)
    for index in layers:
        heads = needs.attention == "every" or (needs.attention == "first" and index == layers[0])
        written[index] = LayerMask(
            _padded(keep[index].attention, int(heads), needs.kv_multiple),
            _padded(keep[index].ffn, int(needs.ffn == "every"), needs.ffn_multiple),
        )
    return RuntimeShapes(layers, keep, tuple(written))


def _padded(mask: Tensor, least: int, multiple: int) -> Tensor:
    """The mask `(units,)` with as many more as it takes to `least` and then to a multiple, at most all."""
    kept = int(mask.sum())
    wanted = min(-(-max(kept, least) // multiple) * multiple, len(mask))
    padded = mask.clone()
    padded[(~mask).nonzero().squeeze(1)[: wanted - kept]] = True
    return padded


def output_columns(dense: Tensor, kept: Tensor, written: Tensor, repaired: Tensor | None) -> Tensor:
    """The output projection `(hidden, written inputs)` of a block: zeros in the columns of the padding.

    dense: the base's `(hidden, inputs)`; kept, written: masks `(units,)`, the first within the second; repaired:
    `(hidden, kept inputs)`, in the place of the dense columns.
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
