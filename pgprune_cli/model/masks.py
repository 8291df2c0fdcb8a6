"""Masks over the units of a model, layer by layer, and the repaired output projections that go with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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


class Output(NamedTuple):
    """An output projection on its kept inputs: weight `(hidden, kept)`, and bias `(hidden,)` or None.

    Of a mixture of experts: weight `(kept experts, hidden, kept channels)`, as the family stores it.
    """

    weight: Tensor
    bias: Tensor | None


Outputs = Mapping[tuple[int, str], Output]
"""Repaired output projections by (layer, block name). A block without an entry keeps the weights of the base model."""


def columns_of(elements: Tensor, width: int) -> Tensor:
    """Return the columns of an output projection that belong to elements, each a run of `width` columns.

    elements: indices `(n,)` int64 in any order. Returns `(n · width,)` int64, element after element.
    """
    return (elements[:, None] * width + torch.arange(width, device=elements.device)).flatten()
