"""Measure whether a pruned forward pass is cheaper: time the shrunk model against the masked dense model, in turn.

    python scripts/bench/shrunk_forward.py MODEL [--keep 0.8 0.7 0.5] [--repeats 7]

The masked dense model multiplies the inputs of the output projections by the mask, as most pruning code does. Both run
the same random mask on the same tokens. A ratio below 1 means that the shrunk model is faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from subject import Ratio, arguments, in_turn, opened, random_mask, table
from torch import Tensor, nn

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


def compare(evaluator: Evaluator, model_mask: ModelMask, tokens: Tensor, repeats: int) -> Ratio:
    """Time the shrunk forward pass against the masked one."""

    def shrunk() -> None:
        with evaluator.shrunk(model_mask):
            summed_loss(evaluator.model.module, tokens)

    def dense() -> None:
        with masked(evaluator, model_mask):
            summed_loss(evaluator.model.module, tokens)

    return in_turn(shrunk, dense, repeats, evaluator.model.device)


def main() -> None:
    parser = arguments(__doc__, repeats=7)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.7, 0.5])
    options = parser.parse_args()
    evaluator, tokens = opened(options)
    rows = [(kept, *compare(evaluator, random_mask(evaluator, kept), tokens, options.repeats)) for kept in options.keep]
    table(("keep", "shrunk s", "masked s", "ratio", "least", "greatest"), rows)


if __name__ == "__main__":
    main()
