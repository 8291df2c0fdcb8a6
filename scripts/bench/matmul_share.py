"""Measure which share of the machine's matrix-product speed a forward pass reaches.

    python scripts/bench/matmul_share.py MODEL [--keep 1.0 0.5] [--repeats 5]

Forward passes and plain matrix products are timed in turn. The FLOPs of a forward pass are those of its matrix products
(pgprune_cli/estimate/flops.py), so norms, softmax and the gathering of kept weights lower the share.
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
from pgprune_cli.recipe.schema import BudgetSettings, CalibrationSettings, Recipe

CPU_SIZE, GPU_SIZE = 1024, 8192
"""Rows of the square matrices that are multiplied: large enough to reach the full rate."""


def flops_of(evaluator: Evaluator, kept: float, tokens: Tensor) -> int:
    """Return the FLOPs of one forward pass."""
    recipe = Recipe(model="", calibration=CalibrationSettings(corpus=""), budget=BudgetSettings(sparsity=1.0 - kept))
    return forward_passes(Sizes(evaluator.model, recipe), tokens, 1).total()


def shares(
    evaluator: Evaluator, model_mask: ModelMask, flops: int, tokens: Tensor, repeats: int
) -> list[tuple[float, float]]:
    """Return pairs of FLOPs per second: (forward pass, plain matrix products). The first pair only warms up.

    The products run for as long as the forward pass did, so that other load on the machine slows both alike.
    """
    device = evaluator.model.device
    size = GPU_SIZE if device.type == "cuda" else CPU_SIZE
    square = torch.ones(size, size, device=device, dtype=evaluator.model.dtype)
    pairs = []
    for _ in range(repeats + 1):
        forward = seconds(lambda: evaluator.losses([model_mask], tokens), device)
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
        ratios = [forward_rate / product_rate for forward_rate, product_rate in pairs]
        rows.append((kept, flops / 1e9, forward, products, statistics.median(ratios), min(ratios), max(ratios)))
    table(("keep", "GFLOP", "forward GFLOP/s", "products GFLOP/s", "ratio", "least", "greatest"), rows)


if __name__ == "__main__":
    main()
