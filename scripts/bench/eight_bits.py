"""What do frozen weights in 8 bits cost or gain? Times the shrunk forward from them against that from the model's own
dtype, in turn, in one run.

    python scripts/bench/eight_bits.py MODEL [--weights int8 fp8] [--keep 0.5] [--repeats 7]

int8 weights are made usable block by block; fp8 ones are multiplied as they are, where the device has such products.
Both models exist at a time. Below 1 the weights in 8 bits are faster; the losses say what the rounding does.
"""

from __future__ import annotations

import copy

from subject import arguments, in_turn, opened, random_mask, table

from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.quantized import check_fp8, quantize_projections


def main() -> None:
    parser = arguments(__doc__, repeats=7)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--weights", nargs="+", choices=("int8", "fp8"), default=["int8", "fp8"])
    options = parser.parse_args()
    dense, tokens = opened(options)
    keep = random_mask(dense, options.keep)
    rows = []
    for weights in options.weights:
        if weights == "fp8":
            check_fp8(dense.input_device, next(dense.model.parameters()).dtype)
        model = copy.deepcopy(dense.model)
        quantize_projections(model, weights)
        rounded = Evaluator(PrunableModel.of(model))
        ratio = in_turn(
            lambda rounded=rounded: rounded.losses([keep], tokens),
            lambda: dense.losses([keep], tokens),
            options.repeats,
            dense.input_device,
        )
        losses = (float(evaluator.losses([keep], tokens)) for evaluator in (rounded, dense))
        rows.append((weights, *ratio, *losses))
    columns = ("weights", "8 bits s", "dtype s", "ratio", "least", "greatest", "loss", "loss in dtype")
    table(columns, rows)


if __name__ == "__main__":
    main()
