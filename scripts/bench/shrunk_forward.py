"""Measure whether a pruned forward pass is cheaper: time the shrunk model against the masked dense one, all in turn.

    python scripts/bench/shrunk_forward.py MODEL [--keep 0.8 0.7 0.5] [--repeats 7]

The masked dense model multiplies the inputs of the output projections by the mask, as most pruning code does. The
shrunk model runs on gathered rows, as in a unit search, or on prefixes of weights that were put in order once, as in a
width search. All run the same random mask on the same tokens. A ratio below 1 means that the shrunk model is faster.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager

from subject import arguments, opened, random_mask, seconds, table
from torch import Tensor, nn

from pgprune_cli.forward.element_order import ElementOrders
from pgprune_cli.forward.masked import Evaluator, summed_loss
from pgprune_cli.model.masks import ModelMask


@contextmanager
def masked(evaluator: Evaluator, model_mask: ModelMask) -> Iterator[nn.Module]:
    """Multiply the outputs of removed units by zero inside the `with`, and give the dense model."""
    handles = []
    for layer, layer_mask in zip(evaluator.model.layers, model_mask, strict=True):
        for block in evaluator.model.family.blocks:
            output = block.output_linear(layer)
            units = layer_mask.of(block.name)
            mask = units.repeat_interleave(output.in_features // len(units)).to(output.weight)

            def multiply(_: nn.Module, inputs: tuple[Tensor], mask: Tensor = mask) -> tuple[Tensor]:
                return (inputs[0] * mask,)

            handles.append(output.register_forward_pre_hook(multiply))
    try:
        yield evaluator.model.module
    finally:
        for handle in handles:
            handle.remove()


def in_mask_order(model_mask: ModelMask) -> ElementOrders:
    """Return the orders in which the kept elements of every block come first. The mask keeps whole KV heads."""
    return {
        (index, name): (~layer.of(name)).int().argsort(stable=True)
        for index, layer in enumerate(model_mask)
        for name in ("attention", "ffn")
    }


def compare(evaluator: Evaluator, model_mask: ModelMask, tokens: Tensor, repeats: int) -> list[object]:
    """Time forward passes on prefixes, on gathered rows, and of the masked dense model."""
    device, orders = evaluator.model.device, in_mask_order(model_mask)

    def shrunk() -> float:
        def run() -> None:
            with evaluator.shrunk(model_mask):
                summed_loss(evaluator.model.module, tokens)

        return seconds(run, device)

    def prefixes() -> float:
        with evaluator.in_order(orders):
            return shrunk()

    def dense() -> float:
        with masked(evaluator, model_mask):
            return seconds(lambda: summed_loss(evaluator.model.module, tokens), device)

    times = [(prefixes(), shrunk(), dense()) for _ in range(repeats + 1)][1:]  # the first only warms up
    ratios = [prefix / whole for prefix, _, whole in times]
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    gathered = statistics.median(rows / whole for _, rows, whole in times)
    return [*medians, statistics.median(ratios), min(ratios), max(ratios), gathered]


def main() -> None:
    parser = arguments(__doc__, repeats=7)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.7, 0.5])
    options = parser.parse_args()
    evaluator, tokens = opened(options)
    rows = [(kept, *compare(evaluator, random_mask(evaluator, kept), tokens, options.repeats)) for kept in options.keep]
    headings = ("keep", "prefixes s", "gathered s", "masked s", "ratio", "least", "greatest", "gathered ratio")
    table(headings, rows)


if __name__ == "__main__":
    main()
