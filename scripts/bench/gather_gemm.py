"""Measure whether a kernel that gathers kept rows or columns while it multiplies beats copying them first.

    python scripts/bench/gather_gemm.py MODEL --device cuda [--keep 0.8 0.7 0.5] [--repeats 20]

MODEL is the name of a shape. A Triton kernel is timed in turn against what the shrunk forward pass does (index_select,
then the library's product), on random weights and random units of each projection. A ratio below 1 means that the
kernel is faster. The fastest tile is chosen for each product beforehand. Needs a CUDA device and Triton, which comes
with PyTorch's CUDA builds.

The shrunk forward pass gathers a weight once, while the kernel reads it again for every tile of rows, so the kernel
does best with few tokens. It has not been measured on a GPU yet, and the package does not use it.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from subject import SHAPES, arguments, headline, in_turn, seconds, table
from torch import Tensor
from torch.nn import functional

from pgprune_cli.model.loading import devices_of
from pgprune_cli.model.masks import columns_of
from pgprune_cli.model.unit_tensors import gather_runs


class Tile(NamedTuple):
    """The tokens, outputs and inputs that one kernel program works on at a time, and its number of warps."""

    tokens: int
    outputs: int
    inputs: int
    warps: int


TILES = (Tile(64, 64, 64, 4), Tile(64, 128, 64, 4), Tile(128, 128, 64, 8), Tile(128, 256, 64, 8))


@triton.jit
def _kernel(
    x,
    weight,
    kept,
    y,
    tokens,
    outputs,
    inputs,
    x_stride,
    weight_stride,
    y_stride,
    OF_ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.load(kept + output, mask=output < outputs, other=0) if OF_ROWS else output.to(tl.int64)
    # tl.zeros works in the interpreter only if Triton was imported with it enabled.
    total = tl.full((TOKENS, OUTPUTS), 0.0, tl.float32)
    for start in range(0, inputs, INPUTS):
        position = start + tl.arange(0, INPUTS)
        column = position.to(tl.int64) if OF_ROWS else tl.load(kept + position, mask=position < inputs, other=0)
        x_tile = tl.load(
            x + token.to(tl.int64)[:, None] * x_stride + position[None, :],
            mask=(token[:, None] < tokens) & (position[None, :] < inputs),
            other=0.0,
        )
        weight_tile = tl.load(
            weight + row[None, :] * weight_stride + column[:, None],
            mask=(output[None, :] < outputs) & (position[:, None] < inputs),
            other=0.0,
        )
        total = tl.dot(x_tile, weight_tile, total, input_precision="ieee")
    tl.store(
        y + token.to(tl.int64)[:, None] * y_stride + output[None, :],
        total.to(y.dtype.element_ty),
        mask=(token[:, None] < tokens) & (output[None, :] < outputs),
    )


def gather_matmul(x: Tensor, weight: Tensor, kept: Tensor, axis: int, tile: Tile = TILES[0]) -> Tensor:
    """Multiply x `(tokens, in)` by the kept rows (axis 0) or columns (axis 1) of weight `(out, in)`: `(tokens, out)`.

    `kept` are indices, int64, of rows or columns; along axis 1 x has the kept inputs only. In x's dtype, summed in
    float32. x and weight must have their last dimension contiguous.
    """
    assert x.stride(1) == weight.stride(1) == 1
    outputs = len(kept) if axis == 0 else weight.shape[0]
    y = x.new_empty(len(x), outputs)
    grid = (triton.cdiv(len(x), tile.tokens), triton.cdiv(outputs, tile.outputs))
    _kernel[grid](
        *(x, weight, kept, y, len(x), outputs, x.shape[1], x.stride(0), weight.stride(0), y.stride(0)),
        OF_ROWS=axis == 0,
        TOKENS=tile.tokens,
        OUTPUTS=tile.outputs,
        INPUTS=tile.inputs,
        num_warps=tile.warps,
    )
    return y


def copied_matmul(x: Tensor, weight: Tensor, kept: Tensor, axis: int, units: int) -> Tensor:
    """Compute the same as the shrunk forward pass does: copy the kept units, then multiply."""
    return functional.linear(x, gather_runs(weight, axis, kept, units))


class Product(NamedTuple):
    """A projection: its weight `(outputs, inputs)`, and the axis along which its units lie."""

    name: str
    outputs: int
    inputs: int
    axis: int
    units: int


def products(name: str) -> list[Product]:
    """Return the products of one layer of that shape. up and v have the shapes of gate and k."""
    shape = SHAPES[name]
    hidden, channels, kv_heads = shape["hidden"], shape["channels"], shape["kv_heads"]
    head = hidden // shape["heads"]
    return [
        Product("q", hidden, hidden, 0, kv_heads),
        Product("k", kv_heads * head, hidden, 0, kv_heads),
        Product("o", hidden, hidden, 1, kv_heads),
        Product("gate", channels, hidden, 0, channels),
        Product("down", hidden, channels, 1, channels),
    ]


def compare(product: Product, keep: float, options: argparse.Namespace, device: torch.device) -> tuple[object, ...]:
    """Time one product and return its row of the table."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, options.dtype)
    units = torch.randperm(product.units, generator=generator)[: max(1, round(keep * product.units))].sort().values
    units = units.to(device)
    width = (product.outputs, product.inputs)[product.axis] // product.units
    kept = columns_of(units, width)
    inputs = len(kept) if product.axis else product.inputs
    x = torch.randn(options.batch * options.seqlen, inputs, generator=generator).to(device, dtype)
    weight = torch.randn(product.outputs, product.inputs, generator=generator).to(device, dtype)
    candidates = [partial(gather_matmul, x, weight, kept, product.axis, tile) for tile in TILES]
    for candidate in candidates:
        candidate()  # compile the kernel
    fused = min(candidates, key=lambda candidate: seconds(candidate, device))
    copied = partial(copied_matmul, x, weight, units, product.axis, product.units)
    torch.testing.assert_close(fused(), copied(), rtol=2e-2, atol=2e-2 * inputs**0.5)
    return (product.name, keep, *in_turn(fused, copied, options.repeats, device))


def main() -> None:
    parser = arguments(__doc__, repeats=20)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.7, 0.5])
    options = parser.parse_args()
    if options.model not in SHAPES:
        sys.exit(f"{options.model}: this is not the name of a shape. Choose one of {', '.join(SHAPES)}.")
    device = devices_of(options.device)[0]
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        sys.exit(
            "This benchmark needs a CUDA device. To check the kernel without one, untimed, set TRITON_INTERPRET=1."
        )
    print(headline(options, device))
    rows = [compare(product, keep, options, device) for product in products(options.model) for keep in options.keep]
    table(("projection", "keep", "gathering s", "copying s", "ratio", "least", "greatest"), rows)


if __name__ == "__main__":
    main()
