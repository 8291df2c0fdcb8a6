"""How much of what the machine's matrix products reach does a forward reach? Both are measured in turn, in one run.

    python scripts/bench/matrix_share.py MODEL [--keep 1.0 0.5] [--repeats 5]

The forward's FLOPs are those of its matrix products (pgprune_cli/estimate/flops.py), so that norms, softmax, the
gathering of kept weights and whatever else it does lower the share.
"""

from __future__ import annotations

import statistics

import torch
from subject import arguments, opened, random_mask, seconds, table
from torch import Tensor

from pgprune_cli.estimate.flops import forward_passes
from pgprune_cli.estimate.sizes import Sizes
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.model.masks import ModelMask
from pgprune_cli.recipe.schema import Budget, Calibration, Recipe

ON_CPU, ON_GPU = 1024, 8192
"""Rows of the square matrices of the products: large enough for the full rate."""


def flops_of(evaluator: Evaluator, kept: float, tokens: Tensor) -> int:
    """Of one forward."""
    recipe = Recipe(model="", calibration=Calibration(corpus=""), budget=Budget(sparsity=1.0 - kept))
    return forward_passes(Sizes(evaluator.model, recipe), tokens, 1).total()


def shares(
    evaluator: Evaluator, keep: ModelMask, flops: int, tokens: Tensor, repeats: int
) -> list[tuple[float, float]]:
    """(FLOPs a second of the forward, of matrix products), pair by pair; the first pair warms up.

    Products go on for as long as the forward took, so that what else the machine does falls on both alike.
    """
    device = evaluator.input_device
    size = ON_GPU if device.type == "cuda" else ON_CPU
    square = torch.ones(size, size, device=device, dtype=next(evaluator.model.parameters()).dtype)
    pairs = []
    for _ in range(repeats + 1):
        forward = seconds(lambda: evaluator.losses([keep], tokens), device)
        taken, products = 0.0, 0
        while taken < forward:
            taken += seconds(lambda: square @ square, device)
            products += 1
        pairs.append((flops / forward, products * 2 * size**3 / taken))
    return pairs[1:]


def main() -> None:
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--keep", type=float, nargs="+", default=[1.0, 0.5])
    options = parser.parse_args()
    evaluator, tokens = opened(options)
    rows = []
    for kept in options.keep:
        flops = flops_of(evaluator, kept, tokens)
        pairs = shares(evaluator, random_mask(evaluator, kept), flops, tokens, options.repeats)
        forward, products = (statistics.median(column) / 1e9 for column in zip(*pairs, strict=True))
        ratios = [one / other for one, other in pairs]
        rows.append((kept, flops / 1e9, forward, products, statistics.median(ratios), min(ratios), max(ratios)))
    table(("keep", "GFLOP", "forward GFLOP/s", "products GFLOP/s", "ratio", "least", "greatest"), rows)


if __name__ == "__main__":
    main()
