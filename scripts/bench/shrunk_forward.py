"""Does a pruned forward cost less? Times the shrunk forward against the masked dense one, in turn, in one run.

    python scripts/bench/shrunk_forward.py MODEL [--keep 0.8 0.7 0.5] [--repeats 7]

MODEL is anything a recipe's `model:` may be. The masked dense forward multiplies the inputs of o and down by the mask,
as most pruning code does. Both run the same random mask on the same tokens; the ratio is taken pair by pair, and its
median is printed. Below 1 the shrunk forward is faster.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pgprune_cli.arch import Keep
from pgprune_cli.core.projection import hard_mask
from pgprune_cli.core.space import budget_of
from pgprune_cli.loading import load_model, resolve
from pgprune_cli.substrate import Evaluator, summed_loss


@contextmanager
def masked(evaluator: Evaluator, keep: Keep) -> Iterator[nn.Module]:
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


def seconds(evaluator: Evaluator, tokens: Tensor) -> float:
    began = time.perf_counter()
    summed_loss(evaluator.model, tokens).item()  # .item() waits for the device
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.7, 0.5])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()

    model = load_model(resolve(options.model), options.dtype, options.device)
    evaluator = Evaluator(model)
    space = evaluator.shape.space(("attention", "ffn"))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (options.batch, options.seqlen), generator=generator)
    tokens = tokens.to(evaluator.input_device)
    size = f"{options.batch} × {options.seqlen} tokens"
    print(f"{options.model}, {options.dtype}, {size}, {torch.get_num_threads()} threads")
    print(f"{'keep':>5} {'masked s':>9} {'shrunk s':>9} {'ratio':>6} {'min':>6} {'max':>6}")
    for kept in options.keep:
        theta = torch.rand(space.n, generator=generator, dtype=torch.float64)
        keep = evaluator.shape.keep(space, hard_mask(theta, space, budget_of(space, 1.0 - kept, "per-family")))
        pairs = []
        for _ in range(options.repeats + 1):
            with masked(evaluator, keep):
                dense = seconds(evaluator, tokens)
            with evaluator.shrunk(keep):
                shrunk = seconds(evaluator, tokens)
            pairs.append((dense, shrunk))
        pairs = pairs[1:]  # the first pair warms up
        ratios = [shrunk / dense for dense, shrunk in pairs]
        dense, shrunk = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(ratios)
        print(f"{kept:>5} {dense:>9.3f} {shrunk:>9.3f} {ratio:>6.2f} {min(ratios):>6.2f} {max(ratios):>6.2f}")


if __name__ == "__main__":
    main()
