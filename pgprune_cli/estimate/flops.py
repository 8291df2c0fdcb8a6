"""The FLOPs of a search: 2 for every product of two numbers in a matrix product, textbook counts for solvers.

Softmax, norms, activations, the policy itself and keys that no query sees are not counted. Where the count depends on
the decision, every block is assumed to keep what the budget keeps of all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pgprune_cli.estimate.sizes import BlockSizes, Sizes, tokens_in
from pgprune_cli.forward.curvature import SHARE
from pgprune_cli.forward.gram import block_rows
from pgprune_cli.repair.training import CHECKS, compute_dtype, set_aside
from pgprune_cli.scores.obs import EXPERT_ROUNDS, must_shrink, units_per_round

Flops = Counter[torch.dtype]
"""By the dtype of the computation."""


def seconds(parts: Mapping[str, Flops], rates: Mapping[torch.dtype, float]) -> float:
    """Return how long that takes at the given FLOPs per second."""
    return sum(flop / rates[dtype] for part in parts.values() for dtype, flop in part.items() if flop)


def forward_passes(sizes: Sizes, tokens: Tensor, times: int) -> Flops:
    """Return the FLOPs of `times` losses of the pruned model on `tokens` `(B, T)`."""
    head = head_passes(sizes, tokens)[sizes.dtype]
    return Flops({sizes.dtype: times * (pruned(sizes, [tokens]) + head)})


def head_passes(sizes: Sizes, tokens: Tensor) -> Flops:
    """Return the FLOPs of the head on `tokens` `(B, T)`."""
    predictions = tokens.shape[0] * (tokens.shape[1] - 1)
    return Flops({sizes.dtype: 2 * predictions * sizes.hidden * sizes.vocabulary})


def gradients(sizes: Sizes, batches: Sequence[Tensor]) -> Flops:
    """Return the FLOPs of a forward and a backward pass, which takes twice as many."""
    head = 2 * tokens_in(batches) * sizes.hidden * sizes.vocabulary
    return Flops({sizes.dtype: 3 * (dense(sizes, batches) + head)})


def layer_passes(sizes: Sizes, batches: Sequence[Tensor]) -> Flops:
    """Return the FLOPs of running all dense layers, without the head."""
    return Flops({sizes.dtype: dense(sizes, batches)})


def sampling(sizes: Sizes, batches: Sequence[Tensor]) -> Flops:
    """Return the FLOPs of writing batches `(B, T)` of text, with the logits of every token."""
    return layer_passes(sizes, batches) + Flops({sizes.dtype: 2 * tokens_in(batches) * sizes.hidden * sizes.vocabulary})


def removals(sizes: Sizes) -> Flops:
    """Return the FLOPs of `obs` for every block."""
    return Flops({torch.float32: sum(map(removal, sizes.blocks))})


def widths(sizes: Sizes) -> Flops:
    """Return the FLOPs of solving every block at every width of the table."""
    count = 0
    for block in sizes.blocks:
        n, h = block.inputs, block.outputs
        total = n**3 // 3 if sizes.solves else 2 * n * h * h
        kept = [n * units // block.units for units in range(0, block.units, block.width_step)]
        for first, last in pairwise([*kept, n]):
            run = last - first
            if sizes.solves:
                total += 2 * run * h * (run + h) + first * run * (first + 2 * h)
            else:
                total += 2 * run * (n - first) * h
        count += block.experts * total
    return Flops({torch.float32: count})


def repair_passes(sizes: Sizes, batches: Sequence[Tensor]) -> Flops:
    """Return the FLOPs of the layers that the repair runs.

    Attention is observed alone, the FFN behind the pruned attention; then every pruned layer but the last advances.
    """
    count = dense(sizes, batches) + pruned(sizes, batches) * (sizes.layers - 1) // sizes.layers
    return Flops({sizes.dtype: count + pruned(sizes, batches, sizes.model.family.attention.name)})


def repairs(sizes: Sizes) -> Flops:
    """Return the FLOPs of choosing the kept units of every block again, and of its closed-form repair."""
    count = 0
    for block in sizes.blocks:
        n, h, kept = block.inputs, block.outputs, int(block.inputs * block.keep_fraction)
        if kept < n and sizes.has_table:
            count += removal(block)
        if kept < n and sizes.solves:
            count += block.experts * (2 * kept * n * h + kept**3 // 3)
    return Flops({torch.float32: count})


def block_fits(sizes: Sizes, batches: Sequence[Tensor]) -> Flops:
    """Return the FLOPs of fitting whole blocks (repair/sublayer.py).

    Training on a window takes a forward and a backward pass, which is twice as much except in the inner projections:
    nobody needs the gradient of their inputs. Some windows are only looked at, and twice the whole text.
    """
    windows = sum(map(len, batches))
    held = set_aside(windows)
    trained = sizes.recipe.repair.epochs * (windows - held) / windows
    looks = (1 + CHECKS) * held / windows + 2
    total = 0.0
    for length, tokens in _by_length(batches).items():
        for block, cost in zip(sizes.blocks, sizes.flops_per_token(length), strict=True):
            if held and block.experts == 1 and block.keep_fraction < 1:
                inner = 2 * sizes.hidden * sum(block.inner)
                total += tokens * block.keep_fraction * (looks * cost + trained * (3 * cost - inner))
    return Flops({compute_dtype(sizes.dtype): round(total)})


def last_layers_fit(sizes: Sizes, text: Sequence[Tensor]) -> Flops:
    """Return the FLOPs of fitting the last layers (repair/last_layers.py), without the dense model's hidden states.

    Training reads the text once. The head runs on both models' hidden states, and backwards once.
    """
    windows = sum(map(len, text))
    held = set_aside(windows)
    trained, looks = (windows - held) / windows, (1 + CHECKS) * held / windows
    head = 2 * sizes.hidden * sizes.vocabulary
    total = 0.0
    for length, tokens in _by_length(text).items():
        costs = sizes.flops_per_token(length)[-len(sizes.last_blocks) :]
        for place, (block, cost) in enumerate(zip(sizes.last_blocks, costs, strict=False)):
            inner = 2 * sizes.hidden * sum(block.inner) * (place == 0)  # nobody needs the gradient of its inputs
            total += tokens * block.keep_fraction * (looks * cost + trained * (3 * cost - inner))
        total += tokens * head * (2 * looks + 3 * trained) * bool(sizes.last_blocks)
    return Flops({compute_dtype(sizes.dtype): round(total * bool(held))})


def dense(sizes: Sizes, batches: Sequence[Tensor]) -> int:
    """Return the FLOPs of all dense layers, without the head."""
    return sum(tokens * sum(sizes.flops_per_token(length)) for length, tokens in _by_length(batches).items())


def pruned(sizes: Sizes, batches: Sequence[Tensor], only: str = "") -> int:
    """Return the FLOPs of the kept units of all blocks, or of the blocks of one name."""
    total = 0.0
    for length, tokens in _by_length(batches).items():
        for block, cost in zip(sizes.blocks, sizes.flops_per_token(length), strict=True):
            fraction = block.keep_fraction if block.experts == 1 else 1.0  # fewer experts take as long
            total += tokens * cost * fraction * (only in ("", block.block.name))
    return round(total)


def moments(sizes: Sizes, batches: Sequence[Tensor]) -> Flops:
    """Return the FLOPs of the moments of every output projection's inputs (forward/moments.py)."""
    tokens, count = tokens_in(batches), Flops()
    for block in sizes.blocks:
        if block.experts > 1:
            count[torch.float32] += 2 * tokens * block.experts_per_token * block.inputs**2
        else:
            rows = block_rows(block.inputs)
            dtype = sizes.dtype if sizes.dtype.itemsize == 2 else torch.float32
            count[dtype] += 2 * tokens * sum((part.stop - part.start) * (block.inputs - part.start) for part in rows)
    return count


def curvature(sizes: Sizes, windows: Sequence[Tensor]) -> Flops:
    """Return the FLOPs of the curvature on its windows, behind the layers (forward/curvature.py)."""
    tokens, h = tokens_in(windows), sizes.hidden
    count = Flops({torch.float32: 2 * (tokens + sizes.vocabulary) * h * h})
    count[sizes.dtype] += 4 * tokens * sizes.vocabulary * h
    return count


def roots(sizes: Sizes) -> Flops:
    """Return the FLOPs of R of the later layers."""
    weighted_layers = sum(SHARE * (2 * index / max(1, sizes.layers - 1) - 1) > 0 for index in range(sizes.layers))
    return Flops({torch.float32: weighted_layers * sizes.hidden**3 // 3})


def removal(block: BlockSizes) -> int:
    """Return the FLOPs of `obs` for a block: R W, an inverse, and one update of the remaining inputs per round."""
    width = block.experts * block.inputs // block.elements
    total = 2 * block.outputs**2 * block.inputs + 7 * block.inputs**3 // 3  # a factor and two triangular solves
    for removed, stored, remaining in rounds(block):
        if width > 1:  # the cost of each unit alone
            total += remaining * width * (block.outputs + width // 3)
        total += (2 * removed * stored + removed * removed) * (stored + block.outputs)
    return block.experts * total


class Round(NamedTuple):
    """A round of `obs`: the inputs that it removes, those in its matrices, and those that remain before it."""

    removed: int
    stored: int
    remaining: int


def rounds(block: BlockSizes) -> Iterator[Round]:
    """Yield the rounds in which `obs` removes the units of a block, or of each of its experts."""
    width, remaining = block.experts * block.inputs // block.elements, block.inputs
    if block.experts > 1:
        per_round = max(1, block.inputs // EXPERT_ROUNDS)
    elif block.units == block.elements:
        per_round = units_per_round(block.elements) * width
    else:
        per_round = max(1, block.inputs // block.units)
    stored = remaining
    while remaining:
        removed = min(per_round, remaining)
        yield Round(removed, stored, remaining)
        remaining -= removed
        if must_shrink(stored, remaining):
            stored = remaining


def _by_length(batches: Sequence[Tensor]) -> Counter[int]:
    """Return the tokens by the length of their windows."""
    tokens: Counter[int] = Counter()
    for batch in batches:
        tokens[batch.shape[1]] += batch.numel()
    return tokens
