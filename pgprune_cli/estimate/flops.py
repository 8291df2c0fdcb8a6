"""FLOPs that a search does: 2 for every product of two numbers in a matrix product, what textbooks say in solvers.

Softmax, norms, activations and the policy itself are not counted; neither do keys count that no query sees. Where it
depends on what the search finds, every block is taken to keep what its family keeps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pgprune_cli.estimate.sizes import Block, Sizes, Texts, tokens_in
from pgprune_cli.forward.curvature import SHARE, curvature_windows
from pgprune_cli.scores.obs import units_a_round

Flops = Counter[torch.dtype]
"""By the dtype that they are done in: what devices differ most in is float64."""

EIGH = 9
"""FLOPs of a symmetric eigendecomposition with its vectors, in n³ (Golub & Van Loan 2013, section 8.3)."""


def flops(sizes: Sizes, texts: Texts) -> dict[str, Flops]:
    """By the part of a search that does them, in their order."""
    schedule = sizes.recipe.search
    steps = range(1, schedule.steps + 1)
    looks = sum(step % schedule.evaluate_every == 0 or step in (1, schedule.steps) for step in steps)
    parts = {
        "scoring": scoring(sizes, texts.scoring),
        "width table": width_table(sizes, texts.fitting),
        "search": forward_passes(sizes, texts.step, schedule.steps * schedule.masks_per_step),
        "held-out text": forward_passes(sizes, texts.heldout, looks + 1),
        "repair": repair(sizes, texts.fitting),
    }
    return {name: part for name, part in parts.items() if part.total()}


def seconds(parts: Mapping[str, Flops], rates: Mapping[torch.dtype, float]) -> float:
    """How long that takes at so many FLOPs a second."""
    return sum(count / rates[dtype] for part in parts.values() for dtype, count in part.items() if count)


def forward_passes(sizes: Sizes, tokens: Tensor, times: int) -> Flops:
    """`times` losses of the pruned model on `tokens` `(B, T)`."""
    predictions = tokens.shape[0] * (tokens.shape[1] - 1)
    return Flops({sizes.dtype: times * (pruned(sizes, [tokens]) + 2 * predictions * sizes.hidden * sizes.vocabulary)})


def scoring(sizes: Sizes, batches: Sequence[Tensor]) -> Flops:
    if not sizes.scores_on_text:
        return Flops()
    passed = dense(sizes, batches)
    if sizes.statistic == "gradients":  # a backward pass takes twice what the forward takes
        return Flops({sizes.dtype: 3 * (passed + 2 * tokens_in(batches) * sizes.hidden * sizes.vocabulary)})
    found = Flops({sizes.dtype: passed})
    if sizes.statistic == "covariance":
        found += error_roots(sizes, batches) + moments(sizes, batches)
        for block in sizes.blocks:
            found[torch.float64] += removal(block)
    return found


def width_table(sizes: Sizes, batches: Sequence[Tensor]) -> Flops:
    if not sizes.has_table:
        return Flops()
    found = error_roots(sizes, batches) + moments(sizes, batches)
    found[sizes.dtype] += dense(sizes, batches)
    for block in sizes.blocks:
        n, h = block.inputs, block.outputs
        found[torch.float64] += n**3 // 3 + 4 * n * h * h + 5 * n * n * h
        for kept in range(0, block.units, block.level):
            some = n // block.units * kept
            found[torch.float64] += h * some**2 if sizes.solves else 2 * h * (n - some) ** 2
    return found


def repair(sizes: Sizes, batches: Sequence[Tensor]) -> Flops:
    if not sizes.repairs:
        return Flops()
    found = moments(sizes, batches)
    # Attention is observed by itself, the FFN behind the pruned attention; then the pruned layer goes on.
    found[sizes.dtype] += dense(sizes, batches) + pruned(sizes, batches) + pruned(sizes, batches, "attention")
    if sizes.has_table:
        found += error_roots(sizes, batches)
    for block in sizes.blocks:
        n, h, kept = block.inputs, block.outputs, int(block.inputs * block.keep)
        if kept < n and sizes.has_table:
            found[torch.float64] += removal(block)
        if kept < n and sizes.solves:
            found[torch.float64] += 2 * kept * n * h + kept**3 // 3 + 2 * kept**2 * h
    return found


def dense(sizes: Sizes, batches: Sequence[Tensor]) -> int:
    """Through all layers as they are, without the head."""
    return sum(tokens * sum(sizes.flops_of_token(length)) for length, tokens in _by_length(batches).items())


def pruned(sizes: Sizes, batches: Sequence[Tensor], only: str = "") -> int:
    """Through all layers, or the blocks of one name, on the units that stay."""
    total = 0.0
    for length, tokens in _by_length(batches).items():
        for block, cost in zip(sizes.blocks, sizes.flops_of_token(length), strict=True):
            total += tokens * cost * block.keep * (only in ("", block.name))
    return round(total)


def moments(sizes: Sizes, batches: Sequence[Tensor]) -> Flops:
    """Of the inputs of every output projection (moments.py)."""
    return Flops({torch.float32: 2 * tokens_in(batches) * sum(block.inputs**2 for block in sizes.blocks)})


def error_roots(sizes: Sizes, batches: Sequence[Tensor]) -> Flops:
    """The unembedding's curvature and its eigenvectors, and R of the layers behind the middle (sensitivity.py)."""
    some, h = curvature_windows(batches), sizes.hidden
    tokens = tokens_in(some)
    felt = sum(SHARE * (2 * index / max(1, sizes.layers - 1) - 1) > 0 for index in range(sizes.layers))
    found = Flops({torch.float32: 2 * (tokens + sizes.vocabulary) * h * h, torch.float64: (EIGH + 2 * felt) * h**3})
    found[sizes.dtype] += dense(sizes, some) + 4 * tokens * sizes.vocabulary * h
    return found


def removal(block: Block) -> int:
    """What obs takes for a block: W behind R, an inverse, then round after round what stays makes up for what goes."""
    width, left = block.inputs // block.units, block.inputs
    total = 2 * block.outputs**2 * block.inputs + block.inputs**3
    while left:
        gone = min(units_a_round(block.units) * width, left)
        if width > 1:  # what each of the units costs alone
            total += 2 * left * width * (block.outputs + width)
        left -= gone
        total += (2 * gone * left + gone * gone) * (left + block.outputs)
    return total


def _by_length(batches: Sequence[Tensor]) -> Counter[int]:
    """Tokens, by the length of their windows."""
    found: Counter[int] = Counter()
    for batch in batches:
        found[batch.shape[1]] += batch.numel()
    return found
