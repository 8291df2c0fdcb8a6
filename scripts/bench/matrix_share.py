"""How much of what the machine's matrix products reach does a forward reach? Both are measured in turn, in one run.

    python scripts/bench/matrix_share.py MODEL [--keep 1.0 0.5] [--repeats 5]

The forward's FLOPs are those of its matrix products (pgprune_cli/estimate/work.py), so that norms, softmax, the
gathering of kept weights and whatever else it does lower the share.
"""

from __future__ import annotations

import statistics

from subject import arguments, headline, open_evaluator, random_keep, seconds, some_tokens, table
from torch import Tensor

from pgprune_cli.arch import Keep
from pgprune_cli.estimate.sizes import Sizes
from pgprune_cli.estimate.work import forwards
from pgprune_cli.matrix_rate import matrix_rate
from pgprune_cli.recipe import Budget, Calibration, Recipe
from pgprune_cli.substrate import Evaluator


def flops_of(evaluator: Evaluator, kept: float, tokens: Tensor) -> int:
    """Of one forward."""
    recipe = Recipe(model="", calibration=Calibration(corpus=""), budget=Budget(sparsity=1.0 - kept))
    return forwards(Sizes(evaluator.model, recipe), tokens, 1).total()


def shares(evaluator: Evaluator, keep: Keep, flops: int, tokens: Tensor, repeats: int) -> list[tuple[float, float]]:
    """(FLOPs a second of the forward, of matrix products), pair by pair; the first pair warms up."""
    dtype, device = next(evaluator.model.parameters()).dtype, evaluator.input_device
    pairs = []
    for _ in range(repeats + 1):
        taken = seconds(lambda: evaluator.losses([keep], tokens), device)
        pairs.append((flops / taken, matrix_rate(device, dtype)))
    return pairs[1:]


def main() -> None:
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--keep", type=float, nargs="+", default=[1.0, 0.5])
    options = parser.parse_args()
    evaluator = open_evaluator(options)
    tokens = some_tokens(evaluator, options)
    print(headline(options, evaluator.input_device))
    rows = []
    for kept in options.keep:
        flops = flops_of(evaluator, kept, tokens)
        pairs = shares(evaluator, random_keep(evaluator, kept), flops, tokens, options.repeats)
        forward, products = (statistics.median(column) / 1e9 for column in zip(*pairs, strict=True))
        ratios = [one / other for one, other in pairs]
        rows.append((kept, flops / 1e9, forward, products, statistics.median(ratios), min(ratios), max(ratios)))
    table(("keep", "GFLOP", "forward GFLOP/s", "products GFLOP/s", "ratio", "least", "greatest"), rows)


if __name__ == "__main__":
    main()
