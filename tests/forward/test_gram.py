"""Gram matrices summed over batches, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pgprune_cli.forward import gram
from pgprune_cli.forward.gram import GramSum


def rows_of(inputs: int) -> Tensor:
    """Return correlated rows `(3000, inputs)`, three inputs far larger than the others and one of zeros."""
    generator = torch.Generator().manual_seed(inputs)
    rows = torch.randn(3000, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    rows = rows + torch.randn(inputs, generator=generator)
    rows[:, :3] *= 300.0
    rows[:, -1] = 0.0
    return rows


def summed(rows: Tensor, sizes: list[int], like: torch.dtype) -> Tensor:
    sums = GramSum(torch.zeros(rows.shape[1], rows.shape[1]))
    for part in rows.split(sizes):
        sums.add(sums.products(part, like))
    assert sums.rows == len(rows)
    return sums.matrix()


def errors(sums: Tensor, rows: Tensor) -> Tensor:
    """Return the error of every entry, relative to the lengths of its two columns."""
    exact = rows.double().T @ rows.double()
    lengths = exact.diagonal().sqrt().clamp_min(1e-30)
    return (sums.double() - exact) / lengths / lengths[:, None]


@pytest.mark.parametrize("sizes", [[3000], [1000, 1000, 1000], [1, 2499, 500]], ids=str)
@pytest.mark.parametrize("inputs", [1, 24, 64, 65, 300])
def test_gram_matrix_has_six_digits(inputs: int, sizes: list[int]) -> None:
    rows = rows_of(inputs)
    sums = summed(rows, sizes, torch.float32)
    assert errors(sums, rows).abs().max() < 1e-6
    assert torch.equal(sums, sums.T)


@pytest.mark.parametrize("sizes", [[3000], [1000, 1000, 1000], [100, 2400, 500]], ids=str)
@pytest.mark.parametrize("inputs", [24, 65, 300])
def test_gram_matrix_of_a_bfloat16_model_is_as_precise_as_its_inputs(
    inputs: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gram, "has_bfloat16_products", lambda _: True)
    rows = rows_of(inputs)
    sums = summed(rows, sizes, torch.bfloat16)
    typical = errors(sums, rows).square().mean().sqrt()
    assert typical < (2e-4 if sizes[0] == 100 else 8e-5)  # rounding the rows alone makes 2⁻⁹ / √3000 = 4e-5
    assert torch.equal(sums, sums.T)


def test_products_leave_the_sums_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "has_bfloat16_products", lambda _: True)
    rows, sums = rows_of(100), GramSum(torch.zeros(100, 100))
    sums.add(sums.products(rows[:1000], torch.bfloat16))
    before = sums.sums.clone()
    sums.products(rows[1000:], torch.bfloat16)
    assert torch.equal(sums.sums, before) and sums.rows == 1000


def test_infinite_activations_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "has_bfloat16_products", lambda _: True)
    rows = rows_of(100)
    rows[5, 7] = torch.inf
    assert not summed(rows, [1000, 2000], torch.bfloat16).isfinite().all()
