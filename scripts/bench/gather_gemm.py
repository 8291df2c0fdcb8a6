"""Is it faster to multiply with the kept rows or columns of a weight where they lie than to copy them first?

    python scripts/bench/gather_gemm.py MODEL --device cuda [--keep 0.8 0.7 0.5] [--repeats 20]

MODEL is the name of a shape. Times a Triton kernel that gathers while it multiplies against what the shrunk forward
does (index_select, then the library's product), in turn, in one run, on random weights and units of each projection;
below 1 the kernel is faster. Its tiles are chosen on each product beforehand. Needs a CUDA device and Triton, which
comes with PyTorch's CUDA builds.

The shrunk forward gathers a weight once and the kernel reads it in every tile of rows, so that the kernel has the best
chances with few tokens. Nobody has run this on a GPU yet; until it is faster there, the package has no such kernel.
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

from pgprune_cli.model.families.adapter import gather_units
from pgprune_cli.model.loading import devices_of
from pgprune_cli.model.masks import columns_of


class Tile(NamedTuple):
    """Tokens, outputs and inputs that one program holds at a time, and the warps that work on them."""

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
    # No tl.zeros: the interpreter knows it only where Triton was imported under it.
    total = tl.full((TOKENS, OUTPUTS), 0.0, tl.float32)
    for start in range(0, inputs, INPUTS):
        place = start + tl.arange(0, INPUTS)
        column = place.to(tl.int64) if OF_ROWS else tl.load(kept + place, mask=place < inputs, other=0)
        some_x = tl.load(
            x + token.to(tl.int64)[:, None] * x_stride + place[None, :],
            mask=(token[:, None] < tokens) & (place[None, :] < inputs),
            other=0.0,
        )
        some_weight = tl.load(
            weight + row[None, :] * weight_stride + column[:, None],
            mask=(output[None, :] < outputs) & (place[:, None] < inputs),
            other=0.0,
        )
        total = tl.dot(some_x, some_weight, total, input_precision="ieee")
    tl.store(
        y + token.to(tl.int64)[:, None] * y_stride + output[None, :],
        total.to(y.dtype.element_ty),
        mask=(token[:, None] < tokens) & (output[None, :] < outputs),
    )


def gather_matmul(x: Tensor, weight: Tensor, kept: Tensor, axis: int, tile: Tile = TILES[0]) -> Tensor:
    """x `(tokens, in)` times the kept rows (axis 0) or columns (axis 1) of weight `(out, in)`: `(tokens, out)`.

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
    """The same from kept units, as the shrunk forward does it."""
    return functional.linear(x, gather_units(weight, axis, kept, units))


class Product(NamedTuple):
    """A projection: its weight `(outputs, inputs)`, and the axis along which its units lie."""

    name: str
    outputs: int
    inputs: int
    axis: int
    units: int


def products(name: str) -> list[Product]:
    """Of a layer of that shape; up and v are as gate and k."""
    shape = SHAPES[name]
    hidden, channels, groups = shape["hidden"], shape["channels"], shape["groups"]
    head = hidden // shape["heads"]
    return [
        Product("q", hidden, hidden, 0, groups),
        Product("k", groups * head, hidden, 0, groups),
        Product("o", hidden, hidden, 1, groups),
        Product("gate", channels, hidden, 0, channels),
        Product("down", hidden, channels, 1, channels),
    ]


def compare(product: Product, keep: float, options: argparse.Namespace, device: torch.device) -> tuple[object, ...]:
    """A row of the table."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, options.dtype)
    units = torch.randperm(product.units, generator=generator)[: max(1, round(keep * product.units))].sort().values
    units = units.to(device)
    width = (product.outputs, product.inputs)[product.axis] // product.units
    kept = columns_of(units, width)
    inputs = len(kept) if product.axis else product.inputs
    x = torch.randn(options.batch * options.seqlen, inputs, generator=generator).to(device, dtype)
    weight = torch.randn(product.outputs, product.inputs, generator=generator).to(device, dtype)
    ways = [partial(gather_matmul, x, weight, kept, product.axis, tile) for tile in TILES]
    for way in ways:
        way()  # compiles it
    fused = min(ways, key=lambda way: seconds(way, device))
    copied = partial(copied_matmul, x, weight, units, product.axis, product.units)
    torch.testing.assert_close(fused(), copied(), rtol=2e-2, atol=2e-2 * inputs**0.5)
    return (product.name, keep, *in_turn(fused, copied, options.repeats, device))


def main() -> None:
    parser = arguments(__doc__, repeats=20)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.7, 0.5])
    options = parser.parse_args()
    if options.model not in SHAPES:
        sys.exit(f"{options.model}: expected the name of a shape: {', '.join(SHAPES)}")
    device = devices_of(options.device)[0]
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        sys.exit("needs a CUDA device; TRITON_INTERPRET=1 runs the kernel without one, to check it and not to time it")
    print(headline(options, device))
    rows = [compare(product, keep, options, device) for product in products(options.model) for keep in options.keep]
    table(("projection", "keep", "gathering s", "copying s", "ratio", "least", "greatest"), rows)


if __name__ == "__main__":
    main()
