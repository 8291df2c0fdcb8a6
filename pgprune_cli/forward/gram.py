"""Gram matrices summed over batches, in the fastest products that are precise enough for the model.

A model in a 16-bit dtype has rounded its activations anyway, so their products are computed in bfloat16 where the
device has instructions for it, which takes a fraction of the time of float32. A CPU also rounds the result to bfloat16.
So only its difference from a prediction, made of the batches before, is computed there, and an error of 2⁻⁹ of that
difference is as small as that of the rounded inputs: some millionths of the diagonal, either way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pgprune_cli.errors import RunError
from pgprune_cli.model.devices import has_bfloat16_products

BLOCKS = 4
"""Into how many blocks of rows the matrix is cut. What is below the diagonal blocks is not computed."""

MIN_BLOCK = 64
"""Rows of a block at least: small products are slow, and PyTorch has kernels of its own for them."""


class Products(NamedTuple):
    """A batch's part of a Gram matrix. terms: by block of rows, from the diagonal on, what adds up to it."""

    terms: list[tuple[Tensor, ...]]
    rows: int


class GramSum:
    """Sums XᵀX over batches of rows X.

    sums: `(n, n)` float32, zeros to begin with. Only the upper triangle of its blocks is added to.
    """

    def __init__(self, sums: Tensor) -> None:
        self.sums, self.rows = sums, 0

    def products(self, rows: Tensor, like: torch.dtype) -> Products:
        """Compute what a batch adds, and leave the sums as they are: memory may run out.

        rows: `(N, n)` float32; like: the dtype that the model computes in.
        """
        rounded = like.itemsize == 2 and len(self.sums) > MIN_BLOCK and has_bfloat16_products(rows.device)
        rows = rows.bfloat16() if rounded else rows
        terms: list[tuple[Tensor, ...]] = []
        for part in block_rows(len(self.sums)):
            left, right = rows[:, part].T, rows[:, part.start :]
            if not rounded:
                terms.append((left @ right,))
            elif rows.is_cuda:
                terms.append((torch.mm(left, right, out_dtype=torch.float32),))
            else:
                terms.append(self._difference(left, right, self.sums[part, part.start :]))
        return Products(terms, len(rows))

    def _difference(self, left: Tensor, right: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Return a prediction of a product, and what the product is more than that, both bfloat16."""
        prediction = (known * (len(right) / self.rows)).bfloat16() if self.rows else left @ right
        return prediction, torch.addmm(prediction, left, right, beta=-1)

    def add(self, products: Products) -> None:
        """Add what a batch adds."""
        for part, terms in zip(block_rows(len(self.sums)), products.terms, strict=True):
            for term in terms:
                self.sums[part, part.start :].add_(term)
        self.rows += products.rows

    def matrix(self) -> Tensor:
        """Return the sums, after filling their lower triangle."""
        for part in block_rows(len(self.sums)):
            self.sums[part.stop :, part] = self.sums[part, part.stop :].T
        return self.sums


def block_rows(size: int) -> list[slice]:
    """Return the rows of every block of a `(size, size)` Gram matrix, of which those on the left are not computed."""
    step = max(MIN_BLOCK, -(-size // BLOCKS))
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def cholesky(matrix: Tensor) -> Tensor:
    """Return the lower Cholesky factor of a Gram matrix with a ridge, in the dtype of the matrix.

    If rounding has made the matrix indefinite, float64 is tried, and then a larger ridge. Raises RunError if the matrix
    is not finite.
    """
    if not matrix.isfinite().all():
        raise RunError("the activations on the calibration text are not finite. Try dtype float32 or bfloat16.")
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not failed:
        return factor
    exact = matrix.double()
    factor, failed = torch.linalg.cholesky_ex(exact)
    extra = exact.diagonal().mean() * 1e-6
    while failed:
        exact.diagonal().add_(extra)
        factor, failed = torch.linalg.cholesky_ex(exact)
        extra = extra * 10
    return factor.to(matrix.dtype)
