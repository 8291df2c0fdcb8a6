"""The AdamW of both fits of the repair: of one block, and of the last layers together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from pgprune_cli.data.windows import interleaved
from pgprune_cli.errors import RunError
from pgprune_cli.forward.layerwise import LayerwiseRun
from pgprune_cli.forward.shards import Shards
from pgprune_cli.model.out_of_memory import is_out_of_memory

Result = TypeVar("Result")

WARM_UP = 0.1
"""Fraction of the steps during which the learning rate rises."""

BETAS = (0.9, 0.95)
"""Decay of AdamW's running means of the gradient and of its square."""

TOKENS_PER_STEP = 1024

SET_ASIDE = 1 / 16
"""Fraction of the windows that are not trained on, to choose among the weights that a fit passes through."""

CHECKS = 4
"""How many times a fit looks at the windows set aside."""

OUT_OF_MEMORY = (
    "out of memory while a block is fitted, with its gradients and AdamW's means. Stop other programs or use more "
    "devices, then start the search again. It resumes at the repair."
)

Weights = Mapping[str, Tensor]
"""Weights by their names inside the module that is trained."""


def fitted(run: LayerwiseRun, fit: Callable[[], Result]) -> Result:
    """Return what `fit` returns. If memory runs out, the hidden states of `run` move to the host, and it starts again.

    Raises RunError if memory does not suffice then either.
    """
    try:
        return run.with_room(fit)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(OUT_OF_MEMORY) from error


def trained(
    start: Weights,
    steps: Sequence[Tensor],
    learning_rate: float,
    set_gradients: Callable[[Weights, Tensor], None],
) -> Iterator[Weights]:
    """Train float32 copies of weights, and yield them CHECKS times in their own dtypes, the last time at the end.

    Args:
        steps: the windows `(n,)` of each step.
        learning_rate: the largest. It rises linearly during the first steps and then falls to 0 along a cosine.
        set_gradients: sets the gradients of the float32 weights for the windows of a step, on every process alike.
    """
    # Contiguous, like their gradients: a fused AdamW takes the numbers as they lie in memory.
    moved = {
        name: torch.empty(weight.shape, dtype=torch.float32, device=weight.device).copy_(weight).requires_grad_()
        for name, weight in start.items()
    }
    optimizer = torch.optim.AdamW(
        moved.values(), lr=learning_rate, betas=BETAS, weight_decay=0.0, eps=1e-10, fused=True
    )
    checks = {round(len(steps) * (check + 1) / CHECKS) for check in range(CHECKS)}
    for step, windows in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * scheduled(step, len(steps))
        for weight in moved.values():
            weight.grad = None
        set_gradients(moved, windows)
        torch.nn.utils.clip_grad_norm_(moved.values(), 1.0)
        optimizer.step()
        if step + 1 in checks:
            yield {name: weight.detach().to(start[name].dtype, copy=True) for name, weight in moved.items()}


def best_of(start: Weights, candidates: Iterable[Weights], error: Callable[[Weights], float]) -> Weights:
    """Return the candidate with the least error, or `start` itself if none has less than it."""
    best, least = start, error(start)
    for weights in candidates:
        if (own := error(weights)) < least:
            best, least = weights, own
    return best


def converted(weights: Weights, dtype: torch.dtype) -> Weights:
    """Return weights in another dtype."""
    return {name: weight.to(dtype) for name, weight in weights.items()}


def add_gradients(weights: Weights, gradients: Sequence[Tensor]) -> None:
    """Add gradients to those of the weights, to all of them or, if memory runs out, to none."""
    own = [gradient.contiguous() for gradient in gradients]
    for weight, gradient in zip(weights.values(), own, strict=True):
        weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)


def set_gradients(shards: Shards, weights: Weights, windows: Tensor, add: Callable[[Tensor], None]) -> None:
    """Set the gradients of the weights to their sum over some windows `(n,)` of all shards.

    add: adds the gradients of some rows of this process's text.
    """

    def gradients(rows: Tensor) -> list[Tensor]:
        for weight in weights.values():
            weight.grad = None
        if len(rows):
            add(rows)
        return [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights.values()]

    sums = shards.sum(gradients(shards.rows(shard, windows)) for shard in shards.own)
    for weight, gradient in zip(weights.values(), sums, strict=True):
        weight.grad = gradient


def set_aside_and_trained(windows: Sequence[int], seed: int) -> tuple[Tensor, list[Tensor]]:
    """Return the windows that are set aside, and those of each shard that are trained on.

    windows: the number in each shard. The only window of a shard is not set aside.
    """
    generator, first = torch.Generator().manual_seed(seed), 0
    aside, rest = [], []
    for size in windows:
        order = first + torch.randperm(size, generator=generator)
        aside.append(order[: set_aside(size)])
        rest.append(order[set_aside(size) :])
        first += size
    return torch.cat(aside), rest


def set_aside(windows: int) -> int:
    """Return how many windows of a shard are set aside."""
    return max(0, min(max(1, int(windows * SET_ASIDE)), windows - 1))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of passes through a part of a model in `dtype`. Gradients can be too small for float16."""
    return torch.float32 if dtype == torch.float16 else dtype


def parts(windows: Tensor, seqlen: int) -> tuple[Tensor, ...]:
    """Split windows `(n,)` of `seqlen` tokens into those of single steps."""
    split: tuple[Tensor, ...] = windows.split(max(1, TOKENS_PER_STEP // seqlen))
    return split


def epochs_of(shards: Sequence[Tensor], seqlen: int, epochs: int, seed: int) -> list[Tensor]:
    """Return the windows of every step, in a new order in every epoch. shards: the windows `(n,)` of each."""
    generator = torch.Generator().manual_seed(seed)
    return [
        part
        for _ in range(epochs)
        for part in parts(
            interleaved([windows[torch.randperm(len(windows), generator=generator)] for windows in shards]), seqlen
        )
    ]


def scheduled(step: int, steps: int) -> float:
    """Return the fraction of the largest learning rate at a step: a linear rise, then a cosine to 0."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
