"""Compare our way of computing the losses of two masks with the paper's way, in turn, in one run.

    python scripts/bench/paper_way.py MODEL [--keep 0.8 0.5] [--repeats 5]

The paper's code runs the dense model and multiplies the outputs of attention heads and FFN channels by the mask,
computes all logits at once, and after each forward pass waits for the device and empties its cache. We run the shrunk
model, compute the logits in chunks and wait once for all masks. A ratio below 1 means that our way is faster.
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
def paper_losses(evaluator: Evaluator, model_masks: list[ModelMask], tokens: Tensor) -> list[float]:
    """Return the loss of every mask, computed as the paper's code does."""
    losses = []
    for model_mask in model_masks:
        with masked(evaluator, model_mask):
            logits = evaluator.model.module(input_ids=tokens, use_cache=False).logits[:, :-1].float()
            losses.append(functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item())
        del logits
        if evaluator.model.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    return losses


def compare(evaluator: Evaluator, model_masks: list[ModelMask], tokens: Tensor, repeats: int) -> Ratio:
    """Time our losses against the paper's."""
    return in_turn(
        lambda: evaluator.losses(model_masks, tokens),
        lambda: paper_losses(evaluator, model_masks, tokens),
        repeats,
        evaluator.model.device,
    )


def main() -> None:
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.5])
    options = parser.parse_args()
    evaluator, tokens = opened(options)
    rows = []
    for kept in options.keep:
        model_masks = [random_mask(evaluator, kept, seed) for seed in (0, 1)]
        rows.append((kept, *compare(evaluator, model_masks, tokens, options.repeats)))
    table(("keep", "ours s", "paper's way s", "ratio", "least", "greatest"), rows)


if __name__ == "__main__":
    main()
