"""Text that a model writes: tokens drawn from its own predictions, one after another."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pgprune_cli.distributed import ALONE, Ranks
from pgprune_cli.errors import RunError
from pgprune_cli.forward.batch_splitting import BatchSplitter


def sampled_batches(
    model: nn.Module, first: int, ordinary: Tensor, shapes: Sequence[tuple[int, int]], seed: int, ranks: Ranks = ALONE
) -> Iterator[Tensor]:
    """Yield batches of tokens `(B, T)` int64, on the CPU, that a causal model writes behind the token `first`.

    Tokens are drawn at temperature 1. Batches depend on the seed and not on the processes, which share them.

    Args:
        ordinary: the tokens that may be drawn, `(vocabulary,)` bool.
        shapes: `(B, T)` of every batch.

    Raises RunError if the model overflows, or if memory does not suffice for one window.
    """
    splitter = BatchSplitter()

    def write(index: int) -> Tensor:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % (1 << 63))
        chances = torch.rand(*shapes[index], generator=generator, dtype=torch.float64)
        parts: list[Tensor] = []
        splitter.run_slices(len(chances), lambda rows: parts.append(_written(model, first, ordinary, chances[rows])))
        return torch.cat(parts)

    yield from ranks.divide(write, shapes, torch.int64)


@torch.no_grad()
def _written(model: nn.Module, first: int, ordinary: Tensor, chances: Tensor) -> Tensor:
    """Return tokens `(B, T)`, drawn with one number between 0 and 1 for each: chances `(B, T)` float64."""
    causal: Any = model
    device = causal.get_input_embeddings().weight.device
    # Its name depends on the version of transformers.
    name = "cache" if "cache" in inspect.signature(causal.forward).parameters else "past_key_values"
    tokens, cache = torch.full((len(chances), 1), first), None
    for chance in chances.split(1, dim=1):
        output = causal(input_ids=tokens[:, -1:].to(device), use_cache=True, **{name: cache})
        cache = output[name]
        logits = output.logits[:, -1].float().cpu().masked_fill(~ordinary, -torch.inf)
        cumulative = logits.softmax(-1).double().cumsum(-1)
        if not cumulative[:, -1].isfinite().all():
            raise RunError("the logits of text that the model writes are not finite. Try dtype float32 or bfloat16.")
        # Each token has a number of its own, so a batch that is split for want of memory gets the same tokens.
        drawn = torch.searchsorted(cumulative, chance * cumulative[:, -1:], right=True)
        tokens = torch.cat([tokens, drawn], dim=1)
    return tokens[:, 1:]
