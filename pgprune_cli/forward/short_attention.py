"""Attention in short windows on a CPU, through products of whole matrices.

PyTorch's blockwise kernel keeps no scores, which pays in long windows. In windows of 128 tokens in bfloat16, its
forward and backward pass take four times as long as those of the plain formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

LONGEST = 256
"""Tokens of a window up to which the plain formula is used."""


class ShortAttention(TorchFunctionMode):
    """Inside the `with`, short windows are attended to by the plain formula."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace `scaled_dot_product_attention` without dropout, and leave everything else alone."""
        named = dict(kwargs or {})
        is_attention = function is functional.scaled_dot_product_attention
        if is_attention and args[0].shape[-2] <= LONGEST and not named.get("dropout_p"):
            return plain_attention(*args, **named)
        return function(*args, **named)


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return what `scaled_dot_product_attention` returns for these arguments, without dropout."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query * scale @ key.transpose(-2, -1)  # the query is smaller than the scores
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:  # added, which takes less time than `masked_fill`, and none backward
            attn_mask = torch.zeros_like(attn_mask, dtype=scores.dtype).masked_fill_(~attn_mask, -math.inf)
        scores = scores + attn_mask
    return scores.softmax(-1) @ value
