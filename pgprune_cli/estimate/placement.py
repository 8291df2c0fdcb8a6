"""Where a search with known needs is placed: on how many GPUs, in how many processes, and what has room there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pgprune_cli.estimate.memory import Memory, memory
from pgprune_cli.estimate.passes import Setup
from pgprune_cli.estimate.sizes import Sizes, Texts
from pgprune_cli.forward.shards import SHARDS
from pgprune_cli.forward.states import bytes_beside
from pgprune_cli.forward.uploads import SLOTS
from pgprune_cli.model.devices import RESERVE

Fits = Literal["whole", "parts", "no"]

WASTE = 1.05
"""What an allocator takes for a tensor of size 1."""


@dataclass(frozen=True)
class Need:
    """What a search needs, in bytes.

    weights: of the model, divided among its devices; beside: the rest on each device; least: the same with one window
    at a time and equations solved on the CPU, which is how a search continues when a GPU's memory runs out; step:
    beside the weights, during the steps alone; host: in main memory.
    """

    weights: int
    beside: int
    least: int
    step: int
    host: int


def need(sizes: Sizes, texts: Texts) -> Need:
    """Return what a search needs on these texts."""
    whole, least = memory(sizes, texts), memory(sizes, _one_window_each(texts), solves=False)
    step = round(WASTE * (whole.activations + whole.slices))
    return Need(whole.weights, _beside(whole), _beside(least), step, whole.host)


def _beside(needed: Memory) -> int:
    return round(WASTE * (needed.device - needed.weights))


def _one_window_each(texts: Texts) -> Texts:
    kinds = (texts.scoring, texts.table, texts.repair, texts.sampled)
    scoring, table, repair, sampled = ([batch[:1] for batch in batches] for batches in kinds)
    return Texts(scoring, table, repair, texts.step[:1], texts.heldout, sampled)


@dataclass(frozen=True)
class Placement:
    """How a search runs on some GPUs of one kind.

    gpus: that hold one copy of the model; processes: each with a copy; fits: as a whole; in parts, with smaller batches
    and equations solved on the CPU; or not at all.
    """

    gpus: int
    processes: int
    fits: Fits


def place(needed: Need, room: int, gpus: int, most_processes: int) -> Placement:
    """Return the placement on GPUs of `room` bytes each: as few as suffice for a copy of the model, and many copies."""
    outcomes: Sequence[tuple[Fits, int]] = (("whole", needed.beside), ("parts", needed.least))
    for fits, beside in outcomes:
        for count in range(1, gpus + 1):
            if needed.weights / count + beside <= room:
                return Placement(count, min(gpus // count, most_processes), fits)
    return Placement(gpus, 1, "no")


def setup(sizes: Sizes, texts: Texts, room: int | None, gpus: int, processes: int) -> Setup:
    """Return how the search runs on each process's GPUs of `room` bytes each, None if host and device are the same."""
    if room is None:
        return Setup(processes=processes, shards=SHARDS)
    needed, whole = need(sizes, texts), memory(sizes, texts).width_table
    free, reserve = int(room - needed.weights / gpus), round(RESERVE * room)
    weight = max(block.experts * block.inputs * block.outputs for block in sizes.blocks) * sizes.dtype.itemsize
    table = share_of_table(whole / gpus, free - needed.step - reserve, SLOTS * weight)
    largest = max((batch.numel() for batch in [*texts.scoring, *texts.table, *texts.repair]), default=0)
    for_states = max(0, free - reserve - bytes_beside(sizes.model, largest))
    return Setup(table, for_states, free >= needed.beside, processes)


def share_of_table(table: float, room: float, ring: int) -> float:
    """Return the fraction of a width table that a GPU keeps (forward/uploads.py).

    table: bytes of its part of the table; room: what is free for it; ring: bytes of the buffers through which the rest
    of the table passes.
    """
    return 1.0 if table <= max(0.0, room) else max(0.0, room - ring) / table
