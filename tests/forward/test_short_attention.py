"""The plain formula of attention equals PyTorch's, and is used in short windows only."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pgprune_cli.forward import short_attention
from pgprune_cli.forward.short_attention import LONGEST, ShortAttention, plain_attention

ALLOWED = torch.ones(12, 12, dtype=torch.bool).tril().triu(-4)
"""A sliding window."""

CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "causal": {"is_causal": True},
    "causal-scaled": {"is_causal": True, "scale": 0.3},
    "bool-mask": {"attn_mask": ALLOWED},
    "float-mask": {"attn_mask": torch.zeros(12, 12).masked_fill(~ALLOWED, -torch.inf)},
}


def inputs(tokens: int, heads: int = 4, kv_heads: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, count, tokens, 8, generator=generator, requires_grad=True)
        for count in (heads, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_plain_attention_and_its_gradients_equal_those_of_pytorch(case: str, kv_heads: int) -> None:
    settings = CASES[case] | {"enable_gqa": kv_heads < 4}
    states = inputs(12, kv_heads=kv_heads)
    outputs = [attend(*states, **settings) for attend in (plain_attention, scaled_dot_product_attention)]
    torch.testing.assert_close(*outputs)
    for own, expected in zip(*(torch.autograd.grad(output.square().sum(), states) for output in outputs), strict=True):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize(("tokens", "plain"), [(LONGEST, 1), (LONGEST + 1, 0)])
def test_only_short_windows_are_attended_to_by_the_plain_formula(
    tokens: int, plain: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(
        short_attention, "plain_attention", lambda *args, **kwargs: calls.append(1) or plain_attention(*args, **kwargs)
    )
    states = inputs(tokens)
    with ShortAttention():
        inside = torch.nn.functional.scaled_dot_product_attention(*states, is_causal=True)
    assert len(calls) == plain
    torch.testing.assert_close(inside, scaled_dot_product_attention(*states, is_causal=True))
    assert len(calls) == plain


def test_attention_with_dropout_is_that_of_pytorch() -> None:
    states = inputs(12)
    settings = {"is_causal": True, "dropout_p": 0.5}
    outputs = []
    for mode in (ShortAttention(), nullcontext()):
        torch.manual_seed(0)
        with mode:
            outputs.append(torch.nn.functional.scaled_dot_product_attention(*states, **settings))
    assert torch.equal(*outputs)
