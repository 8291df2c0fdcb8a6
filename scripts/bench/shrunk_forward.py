"""Does a pruned forward cost less? Times the shrunk forward against the masked dense one, in turn, in one run.

    python scripts/bench/shrunk_forward.py MODEL [--keep 0.8 0.7 0.5] [--repeats 7]

The masked dense forward multiplies the inputs of o and down by the mask, as most pruning code does. Both run the same
random mask on the same tokens; below 1 the shrunk forward is faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from subject import Ratio, arguments, in_turn, opened, random_mask, table
from torch import Tensor, nn

from pgprune_cli.forward.masked import Evaluator, summed_loss
from pgprune_cli.model.masks import ModelMask


@contextmanager
def masked(evaluator: Evaluator, keep: ModelMask) -> Iterator[nn.Module]:
    """The dense model with the outputs of removed units multiplied by zero."""
    handles = []
    for layer, kept in zip(evaluator.layers, keep, strict=True):
        for name, block in evaluator.shape.spec.blocks():
            output = layer.get_submodule(block.output_path)
            units = kept.of(name)
            mask = units.repeat_interleave(output.in_features // len(units)).to(output.weight)

            def multiply(_: nn.Module, inputs: tuple[Tensor], mask: Tensor = mask) -> tuple[Tensor]:
                return (inputs[0] * mask,)

            handles.append(output.register_forward_pre_hook(multiply))
    try:
        yield evaluator.model
    finally:
        for handle in handles:
            handle.remove()


def compare(evaluator: Evaluator, keep: ModelMask, tokens: Tensor, repeats: int) -> Ratio:
    """The shrunk forward over the masked one."""

    def shrunk() -> None:
        with evaluator.shrunk(keep):
            summed_loss(evaluator.model, tokens)

    def dense() -> None:
        with masked(evaluator, keep):
            summed_loss(evaluator.model, tokens)

    return in_turn(shrunk, dense, repeats, evaluator.input_device)


def main() -> None:
    parser = arguments(__doc__, repeats=7)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.7, 0.5])
    options = parser.parse_args()
    evaluator, tokens = opened(options)
    rows = [(kept, *compare(evaluator, random_mask(evaluator, kept), tokens, options.repeats)) for kept in options.keep]
    table(("keep", "shrunk s", "masked s", "ratio", "least", "greatest"), rows)


if __name__ == "__main__":
    main()
