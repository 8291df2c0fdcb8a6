"""Compare the linear algebra of scores, width table and repair with the same in float64, on real activations.

    python scripts/bench/linear_algebra.py MODEL [--text FILE] [--layers 1 14 28] [--windows 64] [--repeats 3]

For the FFN of each layer, in turn: the moments of the inputs of its output projection, the order in which `obs` removes
channels, all widths of the table, and the repair at half the width. A ratio of seconds below 1 means that the package
is faster. Everything after the moments starts from the moments of its own side. The last column says by how much the
results differ. Random tokens are read unless there is a text.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import NamedTuple

import torch
from subject import arguments, headline, in_turn, open_evaluator, table
from torch import Tensor

from pgprune_cli.data.tokens import tokens_of
from pgprune_cli.data.windows import spread
from pgprune_cli.forward.curvature import error_roots
from pgprune_cli.forward.layerwise import start_layerwise
from pgprune_cli.forward.moments import BlockSums, Moments, token_weights
from pgprune_cli.model.loading import load_tokenizer
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.source import resolve
from pgprune_cli.repair.equations import repaired_output, solve_prefixes
from pgprune_cli.scores.obs import removal_order, units_per_round

DAMPING = 1e-2


class Block(NamedTuple):
    """An output projection: its weight and R, and by batch its inputs `(N, in)` and its tokens' weights `(N, 1)`."""

    weight: Tensor
    root: Tensor
    batches: list[tuple[Tensor, Tensor]]


def text_of(options: argparse.Namespace, model: PrunableModel) -> list[Tensor]:
    """Return batches of tokens `(B, T)`."""
    if options.text:
        stream = tokens_of(options.text, "calibration", load_tokenizer(resolve(options.model)))
        windows = stream[: len(stream) // options.seqlen * options.seqlen].view(-1, options.seqlen)
    else:
        generator = torch.Generator().manual_seed(0)
        windows = torch.randint(model.config.vocab_size, (options.windows, options.seqlen), generator=generator)
    return list(spread(windows, options.windows).split(4096 // options.seqlen))


def blocks_of(options: argparse.Namespace, model: PrunableModel) -> dict[int, Block]:
    """Run the dense model up to the last of the layers, and return the FFNs of all of them."""
    batches = text_of(options, model)
    roots, run = error_roots(model, batches), start_layerwise(model, batches)
    blocks = {}
    for index in range(max(options.layers) + 1):
        ffn, seen = model.shape.blocks[index]["ffn"], []
        run.advance(
            index,
            {
                (model.family.residual, ffn.output_path): lambda residual, inputs, seen=seen: seen.append(
                    (inputs.flatten(0, -2), token_weights(residual))
                )
            }
            if index in options.layers
            else {},
        )
        if seen:
            blocks[index] = Block(ffn.output_linear(model.layers[index]).weight, roots[index], seen)
    return blocks


def summed(block: Block) -> Moments:
    """Return the moments as the package sums them."""
    sums = BlockSums(block.weight.shape[1], block.weight.device)
    for inputs, weight in block.batches:
        sums.add(inputs, weight)
    return sums.moments()


def summed_exactly(block: Block) -> Moments:
    """Return the moments, with every product in float64."""
    second, first, total, tokens = 0.0, 0.0, 0.0, 0
    for inputs, weight in block.batches:
        x, w = inputs.double(), weight.double()
        second, first, total = second + (x * w).T @ x, first + (x * w).sum(0), total + w.sum()
        tokens += len(x)
    return Moments(second / total, first / total, total / tokens)


def order_of(block: Block, moments: Moments) -> tuple[Tensor, Tensor]:
    dtype, units = moments.second.dtype, len(moments.second)
    return removal_order(block.root.to(dtype) @ block.weight.to(dtype), moments.second, units, units_per_round(units))


def widths_of(block: Block, moments: Moments, order: Tensor) -> Tensor:
    """Return the errors of 16 widths, and solve their projections."""
    counts = range(0, len(order), -(-len(order) // 16))
    columns = order.flip(0).to(block.weight.device)
    errors, _ = solve_prefixes(block.weight, moments.second, columns, counts, block.root, DAMPING, solve=True)
    return errors


def repaired(block: Block, moments: Moments, columns: Tensor) -> Tensor:
    output = repaired_output(block.weight.to(moments.second.dtype), None, moments, columns, DAMPING, with_bias=False)
    return output.weight.double()


def error_of(block: Block, exact: Moments, columns: Tensor, solution: Tensor) -> float:
    """Return the squared error of a repaired projection on the text, from exact moments."""
    difference = block.weight.double().clone()
    difference[:, columns] -= solution
    return float((difference @ exact.second * difference).sum())


def compare(index: int, block: Block, options: argparse.Namespace) -> list[tuple[object, ...]]:
    """Return the rows of the table for one layer."""
    device, rows = block.weight.device, []
    ours, exact = summed(block), summed_exactly(block)
    lengths = exact.second.diagonal().sqrt()
    difference = float(((ours.second - exact.second) / lengths / lengths[:, None]).square().mean().sqrt())
    ratio = in_turn(partial(summed, block), partial(summed_exactly, block), options.repeats, device)
    rows.append((index, "moments", *ratio, f"entries {difference:.1e} of their columns' lengths"))
    (order, errors), (exact_order, exact_errors) = order_of(block, ours), order_of(block, exact)
    ratio = in_turn(partial(order_of, block, ours), partial(order_of, block, exact), options.repeats, device)
    half = len(order) // 2
    common = len(set(order[half:].tolist()) & set(exact_order[half:].tolist())) / (len(order) - half)
    largest = float((errors / exact_errors - 1).abs().max())
    rows.append((index, "obs", *ratio, f"{common:.1%} of the better half in common, errors {largest:.1e}"))
    of_widths = (widths_of(block, moments, exact_order) for moments in (ours, exact))
    first, second = of_widths
    ratio = in_turn(
        partial(widths_of, block, ours, exact_order),
        partial(widths_of, block, exact, exact_order),
        options.repeats,
        device,
    )
    rows.append((index, "widths", *ratio, f"errors {float((first / second - 1).abs().max()):.1e}"))
    columns = exact_order[half:].sort().values.to(device)
    lost = [error_of(block, exact, columns, repaired(block, moments, columns)) for moments in (ours, exact)]
    ratio = in_turn(partial(repaired, block, ours, columns), partial(repaired, block, exact, columns), 1, device)
    rows.append((index, "repair", *ratio, f"error of the solution {lost[0] / lost[1] - 1:.1e}"))
    return rows


def main() -> None:
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--text", help="a text file (default: random tokens)")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 14, 28])
    parser.add_argument("--windows", type=int, default=64)
    options = parser.parse_args()
    model = open_evaluator(options).model
    print(headline(options, model.device))
    with torch.no_grad():
        rows = [row for index, block in blocks_of(options, model).items() for row in compare(index, block, options)]
    table(("layer", "part", "ours s", "float64 s", "ratio", "least", "greatest", "difference"), rows)


if __name__ == "__main__":
    main()
