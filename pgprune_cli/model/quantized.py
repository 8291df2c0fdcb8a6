"""Projections whose frozen weights lie in 8 bits, in half of bfloat16's memory (recipe key `weights`).

int8: what a forward multiplies with is made when it is needed, in the dtype that the model computes in: of the kept
units of one block at a time (substrate.py), or of one dense matrix where a layer runs as it is. fp8: weights and inputs
are multiplied as they are, where the device can, a scale a row and a token; nothing is made of them. Whoever reads
`weight` gets the rounded weights, dense, as a new tensor.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pgprune_cli.errors import UserError, in_short
from pgprune_cli.model.families import family_of
from pgprune_cli.model.families.adapter import gather_units

ROWS = 256
"""That are rounded at a time, in float32."""

FP8 = torch.float8_e4m3fn

ALIGNED = 16
"""Tensor cores multiply fp8 matrices whose rows are so many bytes, or a multiple."""


class Rows(NamedTuple):
    """Rounded rows of a matrix: values `(out, in)` of one byte, each row of them times its scale `(out, 1)`."""

    values: Tensor
    scale: Tensor


class QuantizedLinear(nn.Linear):
    """A linear layer of `values` `(out, in)`, one byte each, every row of them times its `scale` `(out, 1)`.

    kept: what stands for the weight while a block is shrunk, `(out', in')`: rounded rows, or as it is multiplied, in
    `dtype`, which the model computes in; None otherwise.
    """

    LARGEST: ClassVar[float]
    """Of a value: symmetric, so that a row needs no zero point."""

    values: nn.Parameter
    scale: nn.Parameter

    def __init__(self, linear: nn.Linear) -> None:
        """Of the weights of `linear`, whose bias it takes over; one on the meta device will do."""
        nn.Module.__init__(self)  # and not that of Linear, which would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("bias", linear.bias)
        self.kept: Tensor | Rows | None = None
        self.fill(linear.weight)

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Rounds `weight` `(out, in)` of any floating dtype, on its device; a row that is not finite has no such scale.

        Row by row, so that its largest value is LARGEST. The scale is rounded first, to the dtype that it is kept in,
        so that this rounding costs no more than a step does.
        """
        self.dtype = weight.dtype
        # What stays is allocated before what does not, some rows at a time, so that no holes are left in between.
        values = torch.empty_like(weight, dtype=torch.int8)
        scales = weight.new_empty(len(weight), 1, dtype=self._scale_dtype())
        least = torch.finfo(scales.dtype).smallest_normal
        for rows, some, scale in zip(weight.split(ROWS), values.split(ROWS), scales.split(ROWS), strict=True):
            largest = rows.abs().amax(1, keepdim=True).to(scale)
            scale.copy_(largest.div_(self.LARGEST).clamp_min_(least))
            some.copy_(self._bytes(rows.to(torch.float32, copy=True).div_(scale).clamp_(-self.LARGEST, self.LARGEST)))
        self.values = nn.Parameter(values, requires_grad=False)
        self.scale = nn.Parameter(scales, requires_grad=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """`(out, in)`, or of the kept units, in `dtype`. Not cheap: a new tensor with every call."""
        if isinstance(self.kept, Tensor):
            return self.kept
        return self._made(self._rows())

    def _rows(self) -> Rows:
        """All of them, or those kept."""
        return self.kept if isinstance(self.kept, Rows) else Rows(self.values, self.scale)

    def _picked(self, axis: int, kept: Tensor, units: int) -> Rows:
        """The rounded rows of the kept units as `arch.gather_units` picks them; nothing is made of the others."""
        scale = gather_units(self.scale, 0, kept, units) if axis == 0 else self.scale
        return Rows(gather_units(self.values, axis, kept, units), scale)

    @abstractmethod
    def gathered(self, axis: int, kept: Tensor, units: int) -> Tensor | Rows:
        """What stands for the weight of the kept units, as `arch.gather_units` picks them."""

    @abstractmethod
    def _scale_dtype(self) -> torch.dtype: ...

    @abstractmethod
    def _bytes(self, scaled: Tensor) -> Tensor:
        """Float32 between ± LARGEST, which may be overwritten, as values are stored."""

    @abstractmethod
    def _made(self, rows: Rows) -> Tensor:
        """The weight, in `dtype`."""


class Int8Linear(QuantizedLinear):
    """Whole steps from −127 to 127; the scale is in the dtype that the weight is made in."""

    LARGEST = 127.0

    def gathered(self, axis: int, kept: Tensor, units: int) -> Tensor:
        return self._made(self._picked(axis, kept, units))

    def _scale_dtype(self) -> torch.dtype:
        return self.dtype

    def _bytes(self, scaled: Tensor) -> Tensor:
        return scaled.round_()

    def _made(self, rows: Rows) -> Tensor:
        return rows.values * rows.scale


class Fp8Linear(QuantizedLinear):
    """e4m3, its bits kept as int8, which every operator can gather; the scale is float32, as products want it."""

    LARGEST = torch.finfo(FP8).max

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(self.kept, Tensor):  # repaired
            return functional.linear(input, self.kept, self.bias)
        found = fp8_product(input, *self._rows())
        return found if self.bias is None else found + self.bias

    def gathered(self, axis: int, kept: Tensor, units: int) -> Rows:
        values, scale = self._picked(axis, kept, units)
        return Rows(values.contiguous(), scale)

    def _scale_dtype(self) -> torch.dtype:
        return torch.float32

    def _bytes(self, scaled: Tensor) -> Tensor:
        return scaled.to(FP8).view(torch.int8)

    def _made(self, rows: Rows) -> Tensor:
        return rows.values.view(FP8).to(torch.float32).mul_(rows.scale).to(self.dtype)


def fp8_product(inputs: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """`inputs` `(…, in)`, rounded to e4m3 with a scale a row, times rounded rows: `(…, out)` in the inputs' dtype.

    values: e4m3's bits as int8 `(out, in)`; scale: float32 `(out, 1)`. Sums are made in float32. Raises RuntimeError
    where PyTorch has no such product for the device and the dtype.
    """
    rows, out = inputs.flatten(0, -2), len(values)
    of_rows = torch.linalg.vector_norm(rows, math.inf, dim=1, keepdim=True, dtype=torch.float32)
    of_rows = of_rows.div_(Fp8Linear.LARGEST).clamp_min_(torch.finfo(torch.float32).smallest_normal)
    rounded = (rows / of_rows).to(FP8)
    missing_in, missing_out = -values.shape[1] % ALIGNED, -out % ALIGNED
    if missing_in:
        rounded = functional.pad(rounded.view(torch.int8), (0, missing_in)).view(FP8)
    if missing_in or missing_out:  # zeros, which add nothing; what they put out is left away
        values = functional.pad(values, (0, missing_in, 0, missing_out))
        scale = functional.pad(scale, (0, 0, 0, missing_out))
    by_row = functional.ScalingType.RowWise
    product = functional.scaled_mm(
        rounded, values.view(FP8).t(), of_rows, by_row, scale.t(), by_row, output_dtype=inputs.dtype
    )
    return product[:, :out].unflatten(0, inputs.shape[:-1])


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raises UserError where there are no products of fp8 matrices: with an older PyTorch, or on a chip without."""
    if not hasattr(functional, "scaled_mm"):
        raise UserError(
            f"weight_format: fp8 needs a newer PyTorch than {torch.__version__}, or set weight_format to int8"
        )
    some = torch.zeros(ALIGNED, ALIGNED, dtype=torch.int8, device=device)
    try:
        fp8_product(some.to(dtype), some, some[:, :1].float())
    except (RuntimeError, ValueError) as error:  # no such kernel; sizes, layouts or scales that it does not take
        ways = "set weight_format to int8 or dtype"
        if dtype != torch.bfloat16:  # in which most chips have them, if any
            ways = f"set dtype to bfloat16, or {ways.removeprefix('set ')}"
        raise UserError(
            f"weight_format: {device} multiplies no fp8 in {str(dtype).removeprefix('torch.')}; {ways} ({in_short(error)})"
        ) from error


def quantize_projections(model: nn.Module, weights: Literal["int8", "fp8"]) -> None:
    """Replaces the prunable projections, one after another, so that no two of them exist in both forms.

    What is left in its dtype: embedding, head, norms and biases. A model on the meta device will do.
    """
    kind = {"int8": Int8Linear, "fp8": Fp8Linear}[weights]
    causal: Any = model
    family = family_of(causal.config.model_type)
    for layer in causal.get_submodule(family.layers):
        for block, projection, linear in family.linears(layer):
            setattr(layer.get_submodule(block.module), projection.name, kind(linear))
