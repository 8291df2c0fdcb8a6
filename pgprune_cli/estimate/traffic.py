"""What is counted beside matrix products: the bytes that operators read and write, and how many of them are launched.

They were counted on a Llama in bfloat16 (tests/estimate/test_phases.py), as if no cache held anything.
"""

from __future__ import annotations

from pgprune_cli.estimate import flops
from pgprune_cli.estimate.sizes import BlockSizes, Sizes
from pgprune_cli.forward.divergence import ROWS
from pgprune_cli.forward.masked import SOFTMAX_ROWS

LOGIT, DENSE_LOGIT, LOSS_LOGIT, FITTED_LOGIT = 70, 30, 30, 70
"""Bytes that are moved for a logit: of a mask by the divergence, of the dense model, by the loss alone, and by the fit
of the last layers."""

SAMPLED_LOGIT = 60
"""Bytes that are moved for a logit of text that the dense model writes, on the device and on the host."""

UPDATED, UPDATE = 60, 40
"""Bytes that a step of AdamW moves for a parameter, with its gradient and its dtypes; operations of a step."""

ROUND = 35
"""Operations of a round of `obs`."""

GATHERED = 16
"""Operations with which the kept weights of a block take the place of the dense ones."""


def stream_traffic(sizes: Sizes) -> int:
    """Return the bytes that the norm before a block and the sum behind it move for a token."""
    return sizes.hidden * (28 + 7 * sizes.dtype.itemsize)


def inner_traffic(sizes: Sizes, block: BlockSizes) -> float:
    """Return the bytes that a block moves for a token between its products: rotations, or the activation function."""
    if block.block == sizes.model.family.attention:
        return 10 * sizes.dtype.itemsize * (block.inputs + (sum(block.inner) - block.inputs) / 2)
    return 5 * sizes.dtype.itemsize * block.experts_per_token * block.inputs


def unpacking(sizes: Sizes, nbytes: float) -> float:
    """Return the bytes that unpacking int8 weights moves, 0 for other formats. nbytes: of the weights once unpacked.

    One byte per weight is read, and one number of the model's dtype is written.
    """
    itemsize = sizes.dtype.itemsize
    return nbytes / itemsize * (1 + itemsize) if sizes.recipe.weight_format == "int8" else 0.0


def operations(sizes: Sizes, block: BlockSizes) -> int:
    """Return how many operations a forward pass of a block launches."""
    if block.experts > 1:
        return 20 + 12 * block.experts
    return 24 if block.block == sizes.model.family.attention else 14


def head_bytes(sizes: Sizes, rows: int) -> int:
    """Return the bytes of the head, which is read anew for every few hundred rows."""
    return -(-rows // ROWS) * sizes.hidden * sizes.vocabulary * sizes.dtype.itemsize


def rows_operations(rows: int) -> float:
    """Return how many operations the divergence of a mask launches for some rows of logits."""
    return 28 + 5 * rows / ROWS + 8 * rows / SOFTMAX_ROWS


def removal_traffic(block: BlockSizes) -> int:
    """Return the bytes that `obs` moves for a block: every round reads and writes the inverse and the weights."""
    total = sum(8 * stored**2 + 20 * stored * block.outputs for _, stored, _ in flops.rounds(block))
    return block.experts * total
