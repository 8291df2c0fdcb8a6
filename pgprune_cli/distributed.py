"""One search on many processes: each evaluates its share of the masks, and all of them hear all losses.

`torchrun` starts the processes. Every one of them draws the same masks from the seed and moves the same policy; the
forward passes are divided, and before the search the layers that are scored and solved. A loss, or a layer, is computed by
one process alone and reaches the others as it is, so that nothing depends on how many they are. Only the writer (rank
0) writes, but for its share of the table of widths. Without torchrun there is one process, the writer, and
`torch.distributed` is not touched.

What is exchanged are some numbers a step, and the scores once, on the CPU and by gloo, also where the models are on
GPUs: NCCL would gain nothing on them, would take memory of the GPU, and hang where gloo says at once that a process is
gone.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

from pgprune_cli.errors import RunError

if TYPE_CHECKING:  # the command line asks who writes, and must be quick
    from torch import Tensor
    from torch.distributed import Store

PATIENCE = timedelta(hours=24)
"""The others wait so long for rank 0's scores. One that dies is noticed at once: its connections close."""

PAUSE = 0.1
"""Seconds between two looks for the other processes at the start."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among those of the search: `rank` of `world`."""

    rank: int = 0
    world: int = 1

    @property
    def writer(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` pieces of work are this process's."""
        return range(self.rank, count, self.world)

    def gathered(self, own: Tensor, count: int) -> Tensor:
        """From each process the results of its `share`, float64: all `(count,)`, in order, bit for bit as they were."""
        if self.world == 1:
            return own
        import torch

        everything = torch.zeros(count, dtype=torch.float64)
        everything[list(self.share(count))] = own.double()
        return self._summed(everything)  # of every place's terms all but one are 0

    def united(self, own: Mapping[str, Tensor], lengths: Mapping[str, int]) -> dict[str, Tensor]:
        """Float64 vectors by name, each made by one process: all that `lengths` names, bit for bit as they were."""
        import torch

        everything = torch.zeros(sum(lengths.values()), dtype=torch.int64)
        parts = dict(zip(lengths, everything.split(list(lengths.values())), strict=True))
        for name, values in own.items():
            parts[name].copy_(values.double().view(torch.int64))
        if self.world > 1:
            self._summed(everything)  # of every place's terms all but one are 0
        return {name: part.view(torch.float64) for name, part in parts.items()}

    def greatest(self, value: int) -> int:
        """Of the values that the processes give."""
        if self.world == 1:
            return value
        import torch

        values = torch.zeros(self.world, dtype=torch.int64)
        values[self.rank] = value
        return int(self._summed(values).max())

    def refuse_differences(self, *tensors: Tensor) -> None:
        """Raises RunError, on all processes, where they do not hold the same tensors (on the CPU)."""
        if self.world == 1:
            return
        import torch

        digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).digest()
        digests = torch.zeros(self.world, 4, dtype=torch.int64)
        digests[self.rank] = torch.frombuffer(bytearray(digest), dtype=torch.int64)
        different = (self._summed(digests) != digests[self.rank]).any(1).nonzero()
        if len(different):
            raise RunError(
                f"rank {self.rank} and rank {int(different[0])} are not in the same search: every process needs the "
                "same files, the same versions and the same kind of device"
            )

    @contextmanager
    def writer_first(self) -> Iterator[None]:
        """The writer runs what is inside before the others do, so that they find what it has written."""
        if self.writer:
            yield
        self.greatest(0)
        if not self.writer:
            yield
        self.greatest(0)

    def _summed(self, values: Tensor) -> Tensor:
        from torch import distributed

        try:
            distributed.all_reduce(values)
        except RuntimeError as error:
            raise RunError(f"another process of this search is gone ({' '.join(str(error).split())[:160]})") from error
        return values


@contextmanager
def joined() -> Iterator[Ranks]:
    """This process's place, connected to the others inside the `with`. Raises RunError where they cannot be reached."""
    ranks = of_environment()
    if ranks.world == 1:
        yield ranks
        return
    from torch import distributed

    try:
        store = _meeting_place(ranks)
        distributed.init_process_group("gloo", store=store, rank=ranks.rank, world_size=ranks.world, timeout=PATIENCE)
    except RuntimeError as error:
        raise RunError(f"cannot reach the other processes: {' '.join(str(error).split())[:160]}") from error
    try:
        yield ranks
    finally:
        distributed.destroy_process_group()


def _meeting_place(ranks: Ranks) -> Store:
    """A store for the processes of this start alone.

    torchrun's own outlives them: after a restart it still holds the addresses of those that were lost
    (github.com/pytorch/pytorch/issues/135712). So rank 0 opens a room with a new name in it, and the others knock until
    they are let in: a room whose rank 0 is gone does not answer.
    """
    from torch import distributed

    store, _, _ = next(distributed.rendezvous("env://"))
    own = uuid4().hex
    if ranks.writer:
        room = distributed.PrefixStore(own, store)
        store.set("room", own)
        for rank in range(1, ranks.world):
            while not room.check([f"guest {rank}"]):
                time.sleep(PAUSE)  # and not `get`, in which no signal would be heard
            room.set(f"welcome {room.get(f'guest {rank}').decode()}", "")
        return room
    while True:
        if store.check(["room"]):
            room = distributed.PrefixStore(store.get("room").decode(), store)
            room.set(f"guest {ranks.rank}", own)
            if room.check([f"welcome {own}"]):
                return room
        time.sleep(PAUSE)


def of_environment() -> Ranks:
    """What torchrun says of this process; alone where it was not torchrun that started it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Ranks()
    return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def on_this_machine() -> Ranks:
    """Likewise, among the processes of this machine only."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Ranks()
    return Ranks(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
