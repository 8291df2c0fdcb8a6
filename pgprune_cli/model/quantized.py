"""Linear layers whose frozen weights take one byte each, half the memory of bfloat16 (recipe key `weight_format`).

A search only multiplies with the weights, so they may be rounded while it runs. Exports have the original weights
wherever the repair did not fit new ones. Each row of a weight matrix is divided by a scale, so that its largest entry
becomes the largest number that a byte can hold, and is then rounded. A weight is read as this number times the scale.

- `int8` stores whole numbers from −127 to 127. Before a product, the weights of the kept elements of one block are
  converted back to the model's dtype (one matrix at a time for a dense layer). The product itself is an ordinary one.
- `fp8` stores floating-point numbers with 4 bits of exponent and 3 of mantissa (e4m3), which span from 2⁻⁹ to 448.
  Recent GPUs multiply them directly and faster than bfloat16. So the inputs are rounded too, with one scale per token,
  and no weight is ever converted back.

The attribute `weight` gives the rounded weights in the model's dtype, as a new tensor on every access.
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
from pgprune_cli.model.unit_tensors import FirstElements, KeptElements, UnitTensor

ROWS_AT_A_TIME = 256
"""Rows that are rounded at a time, in float32."""

FP8 = torch.float8_e4m3fn

ROW_MULTIPLE = 16
"""Tensor cores need fp8 matrices whose rows are a multiple of this number of bytes long."""


class Rows(NamedTuple):
    """Rounded rows of a matrix: values `(out, in)` of one byte each, to be multiplied with the scale `(out, 1)`."""

    values: Tensor
    scale: Tensor


class QuantizedLinear(nn.Linear):
    """A linear layer with the weight `values` `(out, in)`, one byte each, times `scale` `(out, 1)`.

    kept: replaces the weight while its block is shrunk to its kept units, `(out', in')`: rounded rows, or a weight in
    `dtype`, which is the dtype that the model computes in. None otherwise.
    """

    LARGEST: ClassVar[float]
    """The largest value. Values are symmetric around zero, so a row needs no zero point."""

    values: nn.Parameter
    scale: nn.Parameter

    def __init__(self, linear: nn.Linear) -> None:
        """Round the weights of `linear` and take over its bias. It may be on the meta device."""
        nn.Module.__init__(self)  # not that of nn.Linear, which would create a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("bias", linear.bias)
        self.kept: Tensor | Rows | None = None
        self.fill(linear.weight)

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Round `weight` `(out, in)`, of any floating dtype, on its device. A row that is not finite has no such scale.

        The scale of a row makes its largest value LARGEST. It is rounded to its own dtype first, so that this rounding
        costs no more than one step.
        """
        self.dtype = weight.dtype
        # The results are allocated before the temporary tensors, so that no gaps are left between them.
        values = torch.empty_like(weight, dtype=torch.int8)
        scales = weight.new_empty(len(weight), 1, dtype=self._scale_dtype())
        smallest = torch.finfo(scales.dtype).smallest_normal
        count = len(weight) if weight.is_meta else ROWS_AT_A_TIME  # without values, memory does not matter
        for rows, rounded, scale in zip(weight.split(count), values.split(count), scales.split(count), strict=True):
            largest = rows.abs().amax(1, keepdim=True).to(scale)
            scale.copy_(largest.div_(self.LARGEST).clamp_min_(smallest))
            # In one expression, so that the temporary tensor is freed before the next rows are read.
            rounded.copy_(
                self._round(rows.to(torch.float32, copy=True).div_(scale).clamp_(-self.LARGEST, self.LARGEST))
            )
        self.values = nn.Parameter(values, requires_grad=False)
        self.scale = nn.Parameter(scales, requires_grad=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The rounded weight `(out, in)`, or that of the kept elements, in `dtype`. Costly: every access makes one."""
        if isinstance(self.kept, Tensor):
            return self.kept
        return self._dequantize(self._rows())

    def _rows(self) -> Rows:
        """Return the rounded rows of the kept elements while the block is shrunk, else of all units."""
        return self.kept if isinstance(self.kept, Rows) else Rows(self.values, self.scale)

    def _gather_rows(self, tensor: UnitTensor, kept: KeptElements | FirstElements) -> Rows:
        """Return the rounded values of the kept elements, as `rows_of` does for weights."""
        scale = kept.rows_of(self.scale, tensor) if tensor.axis == 0 else self.scale
        return Rows(kept.rows_of(self.values, tensor), scale)

    def reorder(self, tensor: UnitTensor, order: KeptElements) -> None:
        """Put the rows or columns of all elements into another order, in place."""
        rows = self._gather_rows(tensor, order)
        self.values.data.copy_(rows.values)
        if tensor.axis == 0:
            self.scale.data.copy_(rows.scale)

    @abstractmethod
    def gathered(self, tensor: UnitTensor, kept: KeptElements | FirstElements) -> Tensor | Rows:
        """Return what replaces the weight while only the kept elements run, as `rows_of` does for weights."""

    @abstractmethod
    def _scale_dtype(self) -> torch.dtype:
        """Return the dtype of the scales."""

    @abstractmethod
    def _round(self, scaled: Tensor) -> Tensor:
        """Return float32 values between ± LARGEST rounded, in the form in which they are stored. May overwrite them."""

    @abstractmethod
    def _dequantize(self, rows: Rows) -> Tensor:
        """Return values times scales as a weight in `dtype`."""


class Int8Linear(QuantizedLinear):
    """A linear layer of whole numbers from −127 to 127. The scale has the model's dtype."""

    LARGEST = 127.0

    def gathered(self, tensor: UnitTensor, kept: KeptElements | FirstElements) -> Tensor:
        return self._dequantize(self._gather_rows(tensor, kept))

    def _scale_dtype(self) -> torch.dtype:
        return self.dtype

    def _round(self, scaled: Tensor) -> Tensor:
        return scaled.round_()

    def _dequantize(self, rows: Rows) -> Tensor:
        return rows.values * rows.scale


class Fp8Linear(QuantizedLinear):
    """A linear layer of e4m3 numbers. The scale is float32, as fp8 products require.

    Their bits are stored as int8, because not every operator can gather fp8.
    """

    LARGEST = torch.finfo(FP8).max

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(self.kept, Tensor):  # a repaired weight, which is not rounded
            return functional.linear(input, self.kept, self.bias)
        product = fp8_product(input, *self._rows())
        return product if self.bias is None else product + self.bias

    def gathered(self, tensor: UnitTensor, kept: KeptElements | FirstElements) -> Rows:
        values, scale = self._gather_rows(tensor, kept)
        return Rows(values.contiguous(), scale)

    def _scale_dtype(self) -> torch.dtype:
        return torch.float32

    def _round(self, scaled: Tensor) -> Tensor:
        return scaled.to(FP8).view(torch.int8)

    def _dequantize(self, rows: Rows) -> Tensor:
        return rows.values.view(FP8).to(torch.float32).mul_(rows.scale).to(self.dtype)


def fp8_product(inputs: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """Return `inputs` `(…, in)`, rounded to e4m3 with a scale per token, times rounded weights: `(…, out)`.

    values: e4m3 bits as int8 `(out, in)`; scale: float32 `(out, 1)`. Sums are float32, the result has the dtype of the
    inputs. Raises RuntimeError if PyTorch has no such product for the device and the dtype.
    """
    tokens, out = inputs.flatten(0, -2), len(values)
    token_scale = torch.linalg.vector_norm(tokens, math.inf, dim=1, keepdim=True, dtype=torch.float32)
    token_scale = token_scale.div_(Fp8Linear.LARGEST).clamp_min_(torch.finfo(torch.float32).smallest_normal)
    rounded = (tokens / token_scale).to(FP8)
    missing_in, missing_out = -values.shape[1] % ROW_MULTIPLE, -out % ROW_MULTIPLE
    if missing_in:
        rounded = functional.pad(rounded.view(torch.int8), (0, missing_in)).view(FP8)
    if missing_in or missing_out:  # padding with zeros adds nothing, and its outputs are dropped
        values = functional.pad(values, (0, missing_in, 0, missing_out))
        scale = functional.pad(scale, (0, 0, 0, missing_out))
    by_row = functional.ScalingType.RowWise
    product = functional.scaled_mm(
        rounded, values.view(FP8).t(), token_scale, by_row, scale.t(), by_row, output_dtype=inputs.dtype
    )
    outputs: Tensor = product[:, :out].unflatten(0, inputs.shape[:-1])
    return outputs


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError if this PyTorch or this device cannot multiply fp8 matrices."""
    if not hasattr(functional, "scaled_mm"):
        raise UserError(
            f"weight_format: PyTorch {torch.__version__} is too old for fp8. "
            "Install a newer one, or set weight_format to int8 or full."
        )
    matrix = torch.zeros(ROW_MULTIPLE, ROW_MULTIPLE, dtype=torch.int8, device=device)
    try:
        fp8_product(matrix.to(dtype), matrix, matrix[:, :1].float())
    except (RuntimeError, ValueError) as error:  # no such kernel, or one that does not take these sizes or scales
        # Most devices that multiply fp8 at all do so in bfloat16.
        bfloat16 = "" if dtype == torch.bfloat16 else "dtype to bfloat16, or "
        raise UserError(
            f"weight_format: {device} cannot multiply fp8 in {str(dtype).removeprefix('torch.')} ({in_short(error)}). "
            f"Set {bfloat16}weight_format to int8 or full."
        ) from error


def quantize_projections(model: nn.Module, weight_format: Literal["int8", "fp8"]) -> None:
    """Replace the prunable projections of a model, one by one, so that only one exists in both forms at a time.

    Embedding, head, norms and biases keep their dtype. The model may be on the meta device.
    """
    quantized_class = {"int8": Int8Linear, "fp8": Fp8Linear}[weight_format]
    causal: Any = model
    family = family_of(causal.config.model_type)
    for layer in causal.get_submodule(family.layers):
        for block, projection, linear in family.linears(layer):
            module_path, _, name = f"{block.module}.{projection}".rpartition(".")
            setattr(layer.get_submodule(module_path), name, quantized_class(linear))
