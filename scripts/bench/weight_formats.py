"""Compare the shrunk forward pass on int8 or fp8 weights with the one on the model's own dtype, in time and in loss.

    python scripts/bench/weight_formats.py MODEL [--weight-formats int8 fp8] [--keep 0.5] [--repeats 7]

int8 weights are converted back block by block; fp8 weights are multiplied directly where the device supports it. Both
models are in memory at once and are timed in turn. A ratio below 1 means that the rounded weights are faster.
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
    parser.add_argument("--weight-formats", nargs="+", choices=("int8", "fp8"), default=["int8", "fp8"])
    options = parser.parse_args()
    dense, tokens = opened(options)
    model_mask = random_mask(dense, options.keep)
    rows = []
    for weight_format in options.weight_formats:
        if weight_format == "fp8":
            check_fp8(dense.model.device, dense.model.dtype)
        model = copy.deepcopy(dense.model.module)
        quantize_projections(model, weight_format)
        rounded = Evaluator(PrunableModel.of(model))
        ratio = in_turn(
            lambda rounded=rounded: rounded.losses([model_mask], tokens),
            lambda: dense.losses([model_mask], tokens),
            options.repeats,
            dense.model.device,
        )
        losses = (float(evaluator.losses([model_mask], tokens)) for evaluator in (rounded, dense))
        rows.append((weight_format, *ratio, *losses))
    columns = ("weight format", "rounded s", "full s", "ratio", "least", "greatest", "loss", "full loss")
    table(columns, rows)


if __name__ == "__main__":
    main()
