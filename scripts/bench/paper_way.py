"""Ours against the paper's way of hearing the losses of two masks, in turn, in one run.

    python scripts/bench/paper_way.py MODEL [--keep 0.8 0.5] [--repeats 5]

The paper's way: in every layer the outputs of attention heads and FFN channels are multiplied by the mask, all logits
are made at once, and after each forward the device is waited for and its cache emptied. Ours: the shrunk forward,
logits by the chunk, one wait for all masks. Below 1 ours is faster.
"""

from __future__ import annotations

import torch
from shrunk_forward import masked
from subject import Ratio, arguments, in_turn, opened, random_mask, table
from torch import Tensor
from torch.nn import functional

from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.model.masks import ModelMask


@torch.no_grad()
def papers_losses(evaluator: Evaluator, keeps: list[ModelMask], tokens: Tensor) -> list[float]:
    losses = []
    for keep in keeps:
        with masked(evaluator, keep):
            logits = evaluator.model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
            losses.append(functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item())
        del logits
        if evaluator.input_device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    return losses


def compare(evaluator: Evaluator, keeps: list[ModelMask], tokens: Tensor, repeats: int) -> Ratio:
    """Our losses over the paper's."""
    return in_turn(
        lambda: evaluator.losses(keeps, tokens),
        lambda: papers_losses(evaluator, keeps, tokens),
        repeats,
        evaluator.input_device,
    )


def main() -> None:
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.5])
    options = parser.parse_args()
    evaluator, tokens = opened(options)
    rows = []
    for kept in options.keep:
        keeps = [random_mask(evaluator, kept, seed) for seed in (0, 1)]
        rows.append((kept, *compare(evaluator, keeps, tokens, options.repeats)))
    table(("keep", "ours s", "paper's way s", "ratio", "least", "greatest"), rows)


if __name__ == "__main__":
    main()
