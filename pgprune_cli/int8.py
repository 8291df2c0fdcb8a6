"""Projections whose frozen weights lie in int8, in half of bfloat16's memory (recipe key `weights`).

What a forward multiplies with is made when it is needed, in the dtype that the model computes in: of the kept units of
one block at a time (substrate.py), or of one dense matrix where a layer runs as it is. Whoever reads `weight` gets the
rounded weights, dense, as a new tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pgprune_cli.arch import gather_units, spec_of

LARGEST = 127
"""Of a value: symmetric, so that −128 is not used and a row needs no zero point."""

ROWS = 256
"""That are rounded at a time, in float32."""


class Int8Linear(nn.Linear):
    """A linear layer of `values` `(out, in)` int8, each row of them times its `scale` `(out, 1)` in the model's dtype.

    kept: what stands for the weight while a block is shrunk, `(out', in')`; None otherwise.
    """

    values: nn.Parameter
    scale: nn.Parameter

    def __init__(self, linear: nn.Linear) -> None:
        """Of the weights of `linear`, whose bias it takes over; one on the meta device will do."""
        nn.Module.__init__(self)  # and not that of Linear, which would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("bias", linear.bias)
        self.kept: Tensor | None = None
        self.fill(linear.weight)

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Rounds `weight` `(out, in)` of any floating dtype, on its device; a row that is not finite has no such scale.

        Row by row to the nearest of 255 steps between ± its largest value. The scale is rounded first, to the dtype
        that it is kept in, so that this rounding costs no more than a step does.
        """
        # What stays is allocated before what does not, some rows at a time, so that no holes are left in between.
        values, scales = torch.empty_like(weight, dtype=torch.int8), weight.new_empty(len(weight), 1)
        least = torch.finfo(weight.dtype).smallest_normal
        for rows, steps, scale in zip(weight.split(ROWS), values.split(ROWS), scales.split(ROWS), strict=True):
            scale.copy_(rows.abs().amax(1, keepdim=True).div_(LARGEST).clamp_min_(least))
            steps.copy_(rows.to(torch.float32, copy=True).div_(scale).round_().clamp_(-LARGEST, LARGEST))
        self.values = nn.Parameter(values, requires_grad=False)
        self.scale = nn.Parameter(scales, requires_grad=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """`(out, in)`, or of the kept units, in the scale's dtype. Not cheap: a new tensor with every call."""
        return self.values * self.scale if self.kept is None else self.kept

    def gathered(self, axis: int, kept: Tensor, units: int) -> Tensor:
        """The weight of the kept units as `arch.gather_units` picks them; nothing is made of the others."""
        values = gather_units(self.values, axis, kept, units)
        return values * (gather_units(self.scale, 0, kept, units) if axis == 0 else self.scale)


def to_int8(model: nn.Module) -> None:
    """Replaces the prunable projections, one after another, so that no two of them exist in both forms.

    What is left in its dtype: embedding, head, norms and biases. A model on the meta device will do.
    """
    spec = spec_of(model.config.model_type)  # type: ignore[union-attr, arg-type]
    for layer in model.get_submodule(spec.layers):  # type: ignore[attr-defined]
        for _, block in spec.blocks():
            module = layer.get_submodule(block.module)
            for projection in block.projections:
                setattr(module, projection.name, Int8Linear(module.get_submodule(projection.name)))
