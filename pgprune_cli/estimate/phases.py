"""What each phase of a search takes: its matrix products, the bytes that it moves, and what the host launches.

A phase is a sequence of parts that run one after another. Weights of the width table that a GPU has no room for are
copied to it while it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from pgprune_cli.estimate import flops
from pgprune_cli.estimate.passes import (
    OwnText,
    Setup,
    curvature,
    dense_head,
    layers,
    masks,
    on_device,
    states,
)
from pgprune_cli.estimate.sizes import BlockSizes, Sizes, Texts, tokens_in
from pgprune_cli.estimate.traffic import (
    FITTED_LOGIT,
    ROUND,
    SAMPLED_LOGIT,
    UPDATE,
    UPDATED,
    head_bytes,
    inner_traffic,
    operations,
    removal_traffic,
)
from pgprune_cli.estimate.work import Work
from pgprune_cli.forward.divergence import MASKS, ROWS
from pgprune_cli.forward.gram import block_rows
from pgprune_cli.repair.last_layers import last_layers_batches, tokens_at_once
from pgprune_cli.repair.least_squares import COPIES
from pgprune_cli.repair.training import CHECKS, TOKENS_PER_STEP, set_aside
from pgprune_cli.repair.width_table import table_bytes
from pgprune_cli.search.phases import Phase


def phases(sizes: Sizes, texts: Texts, setup: Setup) -> dict[Phase, list[Work]]:
    """Return the parts of every phase of a search that has any, in order."""
    parts: dict[Phase, list[Work]] = {
        "opening": opening(sizes),
        "scores": scores(sizes, texts.scoring, setup),
        "width table": width_table(sizes, texts.table, setup),
        "steps": steps(sizes, texts, setup),
        "repair": [
            *sampling(sizes, texts, setup),
            *repair(sizes, texts.repair, setup),
            *final_losses(sizes, texts, setup),
        ],
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
    if sizes.statistic != "covariance":
        return [layers(sizes, batches) + states(sizes, batches, 1, setup)]
    return [
        curvature(sizes, batches, setup),
        observed_layers(sizes, batches, setup),
        (Work(flops.roots(sizes)) + solving(removals(sizes), setup)).divided(sizes.layers, setup.processes),
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
        curvature(sizes, batches, setup),
        observed_layers(sizes, batches, setup)
        + (Work(flops.roots(sizes)) + solved + checked).divided(sizes.layers, setup.processes)
        + Work(disk=table),  # in the background, to the disk that the processes share
        Work(awaited=setup.table * table),  # from mapped files
    ]


def steps(sizes: Sizes, texts: Texts, setup: Setup) -> list[Work]:
    """Return what the steps take, with the evaluations on held-out text."""
    settings = sizes.recipe.search
    if not settings.steps:
        return []
    diverges = settings.objective != "loss"
    looks = sum(map(settings.evaluates, range(settings.steps + 1)))
    own = masks(sizes, texts.step, settings.masks_per_step, setup)
    parts = [own.divided(settings.masks_per_step, setup.processes).times(settings.steps)]
    if diverges:
        # Each process runs the dense model for one of the next steps, and needs its logits for its own masks.
        groups = -(-settings.masks_per_step // (setup.processes * MASKS))
        parts.append(layers(sizes, [texts.step]).times(settings.steps).divided(settings.steps, setup.processes))
        parts.append(dense_head(sizes, texts.step).times(groups * settings.steps))
        parts += on_heldout(
            sizes, texts, setup, lambda batch: layers(sizes, [batch]) + dense_head(sizes, batch).times(looks)
        )
    parts += on_heldout(sizes, texts, setup, lambda batch: masks(sizes, batch, 1, setup).times(looks))
    return parts


def sampling(sizes: Sizes, texts: Texts, setup: Setup) -> list[Work]:
    """Return what the text takes that the dense model writes for the repair, token by token, and the curvature on it.

    The host draws every token from probabilities in float64. Processes share the batches.
    """
    if not texts.sampled:
        return []
    tokens, rounds = tokens_in(texts.sampled), sum(batch.shape[1] for batch in texts.sampled)
    logits = tokens * sizes.vocabulary
    written = Work(
        flops.sampling(sizes, texts.sampled),
        rounds * (sum(block.nbytes for block in sizes.blocks) + sizes.hidden * sizes.vocabulary * sizes.dtype.itemsize),
        layers(sizes, texts.sampled).traffic + logits * SAMPLED_LOGIT,
        copied=4 * logits,
        awaited=4 * logits,
        operations=rounds * sum(operations(sizes, block) for block in sizes.blocks),
    )
    parts = [written.divided(len(texts.sampled), setup.processes)]
    return [*parts, curvature(sizes, texts.repair, setup)] if sizes.has_table else parts


def repair(sizes: Sizes, batches: Sequence[Tensor], setup: Setup) -> list[Work]:
    """Return what the repair takes. Processes divide the text, if it has several shards, and solve all equations."""
    if not sizes.repairs:
        return []
    own = OwnText.of(batches, setup)(batches)
    copies = COPIES if sizes.fits_blocks else 1
    # Every block is observed on its own, the FFN behind the pruned attention; then the layer advances.
    observed = replace(layers(sizes, own).times(2), flops=flops.repair_passes(sizes, own))
    parts = [
        observed + moments(sizes, own) + states(sizes, own, 2, setup, copies),
        solving(repairs(sizes), setup),
    ]
    if sizes.fits_blocks:
        parts.append(block_fits(sizes, batches, setup))
    if sizes.last_blocks:
        parts.append(last_layers(sizes, batches, setup))
    return parts


def final_losses(sizes: Sizes, texts: Texts, setup: Setup) -> list[Work]:
    """Return what the losses of the repaired and of the dense model on held-out text take."""
    heads = 1 + 2 * (sizes.recipe.search.objective != "loss")

    def work(batch: Tensor) -> Work:
        return masks(sizes, batch, 1, setup) + layers(sizes, [batch]) + dense_head(sizes, batch).times(heads)

    return on_heldout(sizes, texts, setup, work)


def on_heldout(sizes: Sizes, texts: Texts, setup: Setup, work: Callable[[Tensor], Work]) -> list[Work]:
    """Return the work on every batch of the held-out text, which the processes divide."""
    batches = texts.heldout.split(sizes.recipe.calibration.batch)
    return [work(batch).divided(len(batches), setup.processes) for batch in batches]


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


def observed_layers(sizes: Sizes, batches: Sequence[Tensor], setup: Setup) -> Work:
    """Return what one process takes to run the layers and to sum the moments of their blocks.

    It observes all layers on its own shards. If every process has the whole text, it observes those that it solves.
    """
    text = OwnText.of(batches, setup)
    own = text(batches)
    observed = moments(sizes, own)
    if not text.is_divided:
        observed = observed.divided(sizes.layers, setup.processes)
    return layers(sizes, own) + states(sizes, own, 1, setup) + observed


def removals(sizes: Sizes) -> Work:
    """Return what `obs` takes for every block."""
    return replace(choosing(sizes.blocks), flops=flops.removals(sizes))


def repairs(sizes: Sizes) -> Work:
    """Return what choosing the kept units again and the closed-form repair take."""
    pruned = [block for block in sizes.blocks if block.keep_fraction < 1]
    return replace(choosing(pruned if sizes.has_table else []), flops=flops.repairs(sizes))


def choosing(blocks: Sequence[BlockSizes]) -> Work:
    """Return what `obs` takes for some blocks besides its products."""
    return Work(
        traffic=sum(map(removal_traffic, blocks)),
        operations=sum(ROUND * block.experts * sum(1 for _ in flops.rounds(block)) for block in blocks),
    )


def solving(work: Work, setup: Setup) -> Work:
    """Return the work of solving equations where they are solved."""
    return work if setup.solves else Work(solved=sum(work.flops.values()))


# --- the fits of the repair


def block_fits(sizes: Sizes, batches: Sequence[Tensor], setup: Setup) -> Work:
    """Return what the fits of whole blocks take, each of which reads and writes all weights of the block per step."""
    text = OwnText.of(batches, setup)
    own, windows = text(batches), sum(map(len, batches))
    fitted = [block for block in sizes.blocks if block.experts == 1 and block.keep_fraction < 1]
    epochs, looks = sizes.recipe.repair.epochs, (1 + CHECKS) * set_aside(windows) / windows + 2
    # What the host has is written there once, and each run through the block reads it through pinned memory.
    moved = 0 if on_device(sizes, own, setup, COPIES) else 2 * sizes.hidden * sizes.dtype.itemsize * tokens_in(own)
    read = len(fitted) * moved * (epochs + looks)
    work = Work(flops.block_fits(sizes, own), copied=read, staged=read, awaited=len(fitted) * moved)
    for block in fitted:
        work += training(sizes, block, batches, epochs, looks, tokens_in(own), text.shards)
    return work


def last_layers(sizes: Sizes, batches: Sequence[Tensor], setup: Setup) -> Work:
    """Return what the fit of the last layers takes, with the dense model's hidden states.

    Processes that have the whole text divide the passes of the dense model, batch by batch.
    """
    text, chosen = OwnText.of(batches, setup), last_layers_batches(batches)
    read, own = [batches[index] for index in chosen], [batches[index] for index in chosen if index in text.batches]
    windows, tokens = sum(map(len, read)), tokens_in(own)
    looks = (1 + CHECKS) * set_aside(windows) / windows
    logits = Work(
        weights=(3 + 2 * looks) * head_bytes(sizes, tokens),
        traffic=(1 + looks) * tokens * sizes.vocabulary * FITTED_LOGIT,
        operations=(1 + looks) * 40 * tokens / ROWS,
    )
    dense = layers(sizes, own if text.is_divided else own[:: setup.processes])
    work = Work(flops.last_layers_fit(sizes, own)) + dense + logits
    parts = max(text.shards, TOKENS_PER_STEP // tokens_at_once(len(sizes.last_layers)))
    for block in sizes.last_blocks:
        work += training(sizes, block, read, 1, looks, tokens, parts)
    return work


def training(
    sizes: Sizes, block: BlockSizes, batches: Sequence[Tensor], epochs: int, looks: float, tokens: int, parts: int
) -> Work:
    """Return what the fit of one block takes besides its products.

    batches: that all processes read together; epochs: how many times it is trained on them; looks: how many times it
    only runs on them; tokens: what this process has of them; parts: in which it runs each step, its shards among them.
    """
    windows = sum(map(len, batches))
    trained = epochs * (windows - set_aside(windows)) / windows
    at_once = max(1, TOKENS_PER_STEP // batches[0].shape[1])
    updates, runs = trained * windows / at_once, looks * tokens / batches[0].shape[1] / at_once
    kept = block.keep_fraction * block.nbytes
    return Work(
        weights=(3 * updates * parts + runs) * kept,
        traffic=updates * kept / sizes.dtype.itemsize * UPDATED
        + (3 * trained + looks) * tokens * block.keep_fraction * inner_traffic(sizes, block),
        operations=updates * (3 * parts * operations(sizes, block) + UPDATE) + runs * operations(sizes, block),
    )
