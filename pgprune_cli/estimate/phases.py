"""What each phase of a search takes: its matrix products, the bytes that it moves, and what the host launches.

A phase is a sequence of parts that run one after another. Weights of the width table that a GPU has no room for are
copied to it while it computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from pgprune_cli.estimate import flops
from pgprune_cli.estimate.flops import Flops
from pgprune_cli.estimate.sizes import BlockSizes, Sizes, Texts, tokens_in
from pgprune_cli.estimate.work import Work
from pgprune_cli.forward.curvature import curvature_windows
from pgprune_cli.forward.divergence import MASKS, ROWS
from pgprune_cli.forward.gram import block_rows
from pgprune_cli.forward.masked import SOFTMAX_ROWS
from pgprune_cli.forward.states import states_bytes
from pgprune_cli.repair.last_layer import last_layer_batches
from pgprune_cli.repair.least_squares import COPIES
from pgprune_cli.repair.training import CHECKS, TOKENS_PER_STEP, set_aside
from pgprune_cli.repair.width_table import table_bytes
from pgprune_cli.search.phases import Phase


@dataclass(frozen=True)
class Setup:
    """How a search runs.

    table: fraction of the width table that is on the device; states: bytes that it has for the hidden states of
    layer-wise passes, which are on the host otherwise; solves: whether equations are solved there; processes: how many
    share the masks of a step and the layers to solve.
    """

    table: float = 1.0
    states: float = math.inf
    solves: bool = True
    processes: int = 1


def phases(sizes: Sizes, texts: Texts, setup: Setup) -> dict[Phase, list[Work]]:
    """Return the parts of every phase of a search that has any, in order."""
    parts: dict[Phase, list[Work]] = {
        "opening": opening(sizes),
        "scores": scores(sizes, texts.scoring, setup),
        "width table": width_table(sizes, texts.fitting, setup),
        "steps": steps(sizes, texts, setup),
        "repair": [*repair(sizes, texts.fitting, setup), *final_losses(sizes, texts, setup)],
    }
    return {phase: works for phase, works in parts.items() if works}


def opening(sizes: Sizes) -> list[Work]:
    """Return what reading the text and loading the model take. Weights are stored in 16 bits."""
    calibration, stored = sizes.recipe.calibration, 2 * sizes.parameters
    tensors = sum(1 for _ in sizes.model.module.parameters())
    return [
        Work(tokenized=(calibration.windows + calibration.heldout) * calibration.seqlen),
        Work(disk=stored, copied=stored, operations=tensors),
    ]


def scores(sizes: Sizes, batches: Sequence[Tensor], setup: Setup) -> list[Work]:
    """Return what the scores take. Those of a metric without text take next to nothing."""
    if not sizes.scores_on_text:
        return []
    if sizes.statistic == "gradients":
        once = layers(sizes, batches)
        return [
            Work(flops.gradients(sizes, batches), 3 * once.weights, 3 * once.traffic, operations=3 * once.operations)
        ]
    passes = layers(sizes, batches) + states(sizes, batches, 1, setup)
    if sizes.statistic != "covariance":
        return [passes]
    return [
        curvature(sizes, batches),
        passes + moments(sizes, batches),
        solving(removals(sizes), setup).divided(sizes.layers, setup.processes),
    ]


def width_table(sizes: Sizes, batches: Sequence[Tensor], setup: Setup) -> list[Work]:
    """Return what the width table takes, which is written while it is solved. Some of it is then on the device."""
    if not sizes.has_table:
        return []
    table = table_bytes(sizes.model, sizes.partitions, sizes.multiples) if sizes.solves else 0
    inputs = sum(block.experts * block.inputs**2 for block in sizes.blocks)
    solved = solving(Work(flops.widths(sizes), traffic=24 * inputs + 6 * table, operations=400 * sizes.layers), setup)
    checked = Work(awaited=table, checked=table)
    return [
        curvature(sizes, batches),
        layers(sizes, batches)
        + moments(sizes, batches)
        + states(sizes, batches, 1, setup)
        + (solved + checked).divided(sizes.layers, setup.processes)
        + Work(disk=table),  # in the background, to the disk that the processes share
        Work(copied=setup.table * table),
    ]


def steps(sizes: Sizes, texts: Texts, setup: Setup) -> list[Work]:
    """Return what the steps take, with the evaluations on held-out text."""
    settings = sizes.recipe.search
    diverges = settings.objective != "loss"
    looks = sum(map(settings.evaluates, range(settings.steps + 1)))
    own = masks(sizes, texts.step, settings.masks_per_step, setup)
    parts = [own.divided(settings.masks_per_step, setup.processes).times(settings.steps)]
    if diverges:
        groups = -(-settings.masks_per_step // MASKS)
        parts.append(dense_model(sizes, texts.step, groups).times(settings.steps))
        parts += on_heldout(sizes, texts, setup, lambda batch: dense_model(sizes, batch, looks))
    parts += on_heldout(sizes, texts, setup, lambda batch: masks(sizes, batch, 1, setup).times(looks))
    return parts if settings.steps else []


def repair(sizes: Sizes, batches: Sequence[Tensor], setup: Setup) -> list[Work]:
    """Return what the repair takes."""
    if not sizes.repairs:
        return []
    passes = layers(sizes, batches)
    copies = COPIES if sizes.fits_blocks else 1
    # Every block is observed on its own, the FFN behind the pruned attention; then the layer advances.
    observed = replace(passes.times(2), flops=flops.repair_passes(sizes, batches))
    parts = [
        observed + moments(sizes, batches) + states(sizes, batches, 2, setup, copies),
        solving(repairs(sizes), setup),
    ]
    if sizes.fits_blocks:
        parts.append(block_fits(sizes, batches, setup))
    if sizes.fits_predictions:
        parts.append(last_layer(sizes, batches))
    return parts


def final_losses(sizes: Sizes, texts: Texts, setup: Setup) -> list[Work]:
    """Return what the losses of the repaired and of the dense model on held-out text take."""
    heads = 1 + 2 * (sizes.recipe.search.objective != "loss")
    return on_heldout(
        sizes, texts, setup, lambda batch: masks(sizes, batch, 1, setup) + dense_model(sizes, batch, heads)
    )


def on_heldout(sizes: Sizes, texts: Texts, setup: Setup, work: Callable[[Tensor], Work]) -> list[Work]:
    """Return the work on every batch of the held-out text, which the processes divide."""
    batches = texts.heldout.split(sizes.recipe.calibration.batch)
    return [work(batch).divided(len(batches), setup.processes) for batch in batches]


# --- passes through layers


def layers(sizes: Sizes, batches: Sequence[Tensor]) -> Work:
    """Return what running all dense layers on batches `(B, T)` takes."""
    blocks = sizes.blocks
    return Work(
        flops.layer_passes(sizes, batches),
        len(batches) * sum(block.nbytes for block in blocks),
        tokens_in(batches) * sum(stream_traffic(sizes) + inner_traffic(sizes, block) for block in blocks),
        operations=len(batches) * sum(operations(sizes, block) for block in blocks),
    )


def masks(sizes: Sizes, tokens: Tensor, count: int, setup: Setup) -> Work:
    """Return what the losses of `count` masks on `tokens` `(B, T)` take, without what the dense model takes."""
    rows, blocks = tokens.shape[0] * (tokens.shape[1] - 1), sizes.blocks
    kept = sum(block.keep_fraction * block.nbytes for block in blocks)
    table = sum(
        block.experts * block.keep_fraction * block.inputs * block.outputs * sizes.dtype.itemsize
        for block in blocks
        if block.keep_fraction < 1 and sizes.has_table and sizes.solves
    )
    # A width search reads the kept weights where they lie; a unit search gathers them first.
    gathered = [block for block in blocks if block.keep_fraction < 1 and not sizes.has_table]
    copies = 2 * sum(block.keep_fraction * block.nbytes for block in gathered)
    per_token = sum(stream_traffic(sizes) + block.keep_fraction * inner_traffic(sizes, block) for block in blocks)
    work = Work(
        flops.forward_passes(sizes, tokens, 1),
        kept + head_bytes(sizes, rows),
        copies + tokens.numel() * per_token + rows * sizes.vocabulary * LOGIT,
        (1 - setup.table) * table,
        operations=sum(operations(sizes, block) for block in blocks) + GATHERED * len(gathered) + rows_operations(rows),
    )
    return work.times(count)


def dense_model(sizes: Sizes, tokens: Tensor, heads: int) -> Work:
    """Return what one pass of the dense model on `tokens` takes, with `heads` passes through its head."""
    rows, once = tokens.shape[0] * (tokens.shape[1] - 1), layers(sizes, [tokens])
    return Work(
        flops.dense_passes(sizes, tokens, 1, heads),
        once.weights + heads * head_bytes(sizes, rows),
        once.traffic + heads * rows * sizes.vocabulary * REFERENCE,
        operations=once.operations + heads * rows_operations(rows),
    )


def curvature(sizes: Sizes, batches: Sequence[Tensor]) -> Work:
    """Return what the weight of an error in every direction takes (forward/curvature.py)."""
    windows = curvature_windows(batches)
    tokens, once = tokens_in(windows), layers(sizes, windows)
    logits = 26 * tokens * sizes.vocabulary + 20 * sizes.vocabulary * sizes.hidden
    return Work(
        flops.error_roots(sizes, batches),
        once.weights + 2 * head_bytes(sizes, tokens),
        once.traffic + logits,
        operations=once.operations,
    )


def states(sizes: Sizes, batches: Sequence[Tensor], passes: int, setup: Setup, copies: int = 1) -> Work:
    """Return what moving the hidden states takes in passes through all layers: nothing if they are on the device."""
    moved = 2 * tokens_in(batches) * sizes.hidden * sizes.dtype.itemsize * sizes.layers
    return Work() if on_device(sizes, batches, setup, copies) else Work(awaited=passes * moved)


def on_device(sizes: Sizes, batches: Sequence[Tensor], setup: Setup, copies: int = 1) -> bool:
    """Return whether the device has room for `copies` tensors of the size of all hidden states."""
    return states_bytes(sizes.model, tokens_in(batches), copies) <= setup.states


def all_on_device(sizes: Sizes, texts: Texts, setup: Setup) -> bool:
    """Return whether the hidden states of every layer-wise pass are on the device."""
    copies = COPIES if sizes.fits_blocks else 1
    return on_device(sizes, texts.scoring, setup) and on_device(sizes, texts.fitting, setup, copies)


# --- moments and solvers


def moments(sizes: Sizes, batches: Sequence[Tensor]) -> Work:
    """Return what the moments of every output projection's inputs take."""
    tokens, total = tokens_in(batches), 0
    for block in sizes.blocks:
        rows = block_rows(block.inputs)
        entries = block.experts * sum((part.stop - part.start) * (block.inputs - part.start) for part in rows)
        # A batch's products are written, read and added to the sums, which are read and written.
        total += len(batches) * 16 * entries + tokens * block.experts_per_token * block.inputs * 16
    return Work(flops.moments(sizes, batches), traffic=total, operations=40 * len(batches) * len(sizes.blocks))


def removals(sizes: Sizes) -> Work:
    """Return what `obs` takes for every block."""
    return Work(
        flops.removals(sizes),
        traffic=sum(map(removal_traffic, sizes.blocks)),
        operations=sum(ROUND * block.experts * sum(1 for _ in flops.rounds(block)) for block in sizes.blocks),
    )


def repairs(sizes: Sizes) -> Work:
    """Return what choosing the kept units again and the closed-form repair take."""
    pruned = [block for block in sizes.blocks if block.keep_fraction < 1]
    again = pruned if sizes.has_table else []
    return Work(
        flops.repairs(sizes),
        traffic=sum(map(removal_traffic, again)),
        operations=sum(ROUND * block.experts * sum(1 for _ in flops.rounds(block)) for block in again),
    )


def solving(work: Work, setup: Setup) -> Work:
    """Return the work of solving equations where they are solved."""
    return work if setup.solves else Work(solved=sum(work.flops.values()))


def removal_traffic(block: BlockSizes) -> int:
    """Return the bytes that `obs` moves for a block: every round reads and writes the inverse and the weights."""
    total = sum(8 * stored**2 + 20 * stored * block.outputs for _, stored, _ in flops.rounds(block))
    return block.experts * total


# --- the fits of the repair


def block_fits(sizes: Sizes, batches: Sequence[Tensor], setup: Setup) -> Work:
    """Return what the fits of whole blocks take, each of which reads and writes all weights of the block per step."""
    windows = sum(map(len, batches))
    fitted = [block for block in sizes.blocks if block.experts == 1 and block.keep_fraction < 1]
    epochs, looks = sizes.recipe.repair.epochs, (1 + CHECKS) * set_aside(windows) / windows + 2
    text = tokens_in(batches)
    moved = 2 * sizes.hidden * sizes.dtype.itemsize * text * (1 + epochs + looks)
    work = Work(
        flops.block_fits(sizes, batches), awaited=0 if on_device(sizes, batches, setup, COPIES) else len(fitted) * moved
    )
    for block in fitted:
        work += training(sizes, block, batches, epochs, looks)
    return work


def last_layer(sizes: Sizes, batches: Sequence[Tensor]) -> Work:
    """Return what the fit of the last layer takes, with the dense model's hidden states."""
    read = [batches[index] for index in last_layer_batches(batches)]
    windows, tokens = sum(map(len, read)), tokens_in(read)
    looks = (1 + CHECKS) * set_aside(windows) / windows
    logits = Work(
        weights=(3 + 2 * looks) * head_bytes(sizes, tokens),
        traffic=(1 + looks) * tokens * sizes.vocabulary * FITTED_LOGIT,
        operations=(1 + looks) * 40 * tokens / ROWS,
    )
    work = Work(flops.last_layer_fit(sizes, batches)) + replace(layers(sizes, read), flops=Flops()) + logits
    for block in sizes.last_blocks:
        work += training(sizes, block, read, 1, looks)
    return work


def training(sizes: Sizes, block: BlockSizes, batches: Sequence[Tensor], epochs: int, looks: float) -> Work:
    """Return what the fit of one block takes besides its products.

    epochs: how many times it is trained on the text; looks: how many times it only runs on it.
    """
    windows, tokens = sum(map(len, batches)), tokens_in(batches)
    trained = epochs * (windows - set_aside(windows)) / windows
    at_once = max(1, TOKENS_PER_STEP // batches[0].shape[1])
    updates, runs = trained * windows / at_once, looks * windows / at_once
    kept = block.keep_fraction * block.nbytes
    return Work(
        weights=(3 * updates + runs) * kept,
        traffic=updates * kept / sizes.dtype.itemsize * UPDATED
        + (3 * trained + looks) * tokens * block.keep_fraction * inner_traffic(sizes, block),
        operations=updates * (3 * operations(sizes, block) + UPDATE) + runs * operations(sizes, block),
    )


# --- bytes and operations

LOGIT, REFERENCE, FITTED_LOGIT = 70, 30, 70
"""Bytes that the divergence moves for a logit of a mask and of the dense model, and the fit of the last layer."""

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
