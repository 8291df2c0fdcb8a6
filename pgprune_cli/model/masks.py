"""Masks over the units of a model, layer by layer, and the repaired weights that go with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerMask:
    """The masks of one decoder layer, `(elements,)` bool, True = kept: of its query heads and of its FFN channels."""

    attention: Tensor
    ffn: Tensor

    def of(self, block: str) -> Tensor:
        """Return the mask of the block of that name."""
        mask: Tensor = getattr(self, block)
        return mask


ModelMask = tuple[LayerMask, ...]
"""The masks of every layer of a model."""


class RepairedBlock(NamedTuple):
    """The refitted weights of a block that keeps only some of its units.

    weight: of the output projection on its kept inputs, `(hidden, kept)`, or for a mixture of experts `(kept experts,
    hidden, kept channels)` as the family stores it; bias: of the output, `(hidden,)`, or None; inner: by their names
    inside the block's module, further refitted tensors with just their kept rows, in the order in which `gather`
    returns them. Every other tensor keeps the weights of the base model.
    """

    weight: Tensor
    bias: Tensor | None
    inner: Mapping[str, Tensor] = MappingProxyType({})

    @property
    def tensors(self) -> list[Tensor]:
        """All refitted weights."""
        return [self.weight, *([] if self.bias is None else [self.bias]), *self.inner.values()]

    def on_host(self) -> RepairedBlock:
        """Return the block in the host's memory."""
        bias = None if self.bias is None else self.bias.cpu()
        return RepairedBlock(self.weight.cpu(), bias, {name: tensor.cpu() for name, tensor in self.inner.items()})


RepairedBlocks = Mapping[tuple[int, str], RepairedBlock]
"""Repaired blocks by (layer, block name). A block without an entry keeps the weights of the base model."""


def columns_of(elements: Tensor, width: int) -> Tensor:
    """Return the columns of an output projection that belong to elements, each a run of `width` columns.

    elements: indices `(n,)` int64 in any order. Returns `(n · width,)` int64, element after element.
    """
    return (elements[:, None] * width + torch.arange(width, device=elements.device)).flatten()
