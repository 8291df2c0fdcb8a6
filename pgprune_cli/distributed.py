"""Run one search on many processes: each process evaluates its share of the masks, and all of them get all losses.

`torchrun` starts the processes. Each draws the same masks from the seed and applies the same updates to the policy.
The forward passes are divided among the processes; before the search starts, so are the layers to score and to solve.
Exactly one process computes each loss, each layer and each shard of the text (forward/shards.py), and the others
receive its bits unchanged, so the result does not depend on the number of processes. Only the writer (rank 0) writes
files, except that every process writes its share of the width table. Without torchrun there is one process, the
writer, and `torch.distributed` is never used.

The processes exchange numbers, hidden states of whole forward passes and, on CPUs, sums over shards. They do it on the
CPU with gloo, even if the models are on GPUs: NCCL would take GPU memory, and would hang where gloo reports at once
that a process has died. What gloo would send for longer than it takes to compute is computed by every process.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

from pgprune_cli.errors import RunError, in_short

if TYPE_CHECKING:  # the command line imports this module and must start quickly
    import torch
    from torch import Tensor
    from torch.distributed import Store

TIMEOUT = timedelta(hours=24)
"""How long an all-reduce waits for the slowest process. A process that dies is noticed at once."""

POLL_INTERVAL = 0.1
"""Seconds between two checks of the store while the processes find each other."""


@dataclass(frozen=True)
class Ranks:
    """The rank of this process and the number of processes."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_writer(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return the indices of the work items, out of `count`, that this process does."""
        return range(self.rank, count, self.world_size)

    def gather(self, local_results: Tensor, count: int) -> Tensor:
        """Return the results of all `count` work items in order, bit for bit: `(count,)` float64.

        local_results: those of this process's `share(count)`.
        """
        if self.world_size == 1:
            return local_results
        import torch

        results = torch.zeros(count, dtype=torch.float64)
        results[list(self.share(count))] = local_results.double()
        return self._all_reduce(results)  # exact: for each entry, all processes but one add 0

    def merge(self, local_vectors: Mapping[str, Tensor], lengths: Mapping[str, int]) -> dict[str, Tensor]:
        """Return the float64 vectors of all processes by name, bit for bit.

        local_vectors: those that this process computed, every name on one process only; lengths: of all vectors.
        """
        import torch

        bits = torch.zeros(sum(lengths.values()), dtype=torch.int64)
        slots = dict(zip(lengths, bits.split(list(lengths.values())), strict=True))
        for name, values in local_vectors.items():
            slots[name].copy_(values.double().view(torch.int64))
        if self.world_size > 1:
            self._all_reduce(bits)  # exact: for each entry, all processes but one add 0
        return {name: slot.view(torch.float64) for name, slot in slots.items()}

    def divide(
        self, compute: Callable[[int], Tensor], shapes: Sequence[Sequence[int]], dtype: torch.dtype
    ) -> Iterator[Tensor]:
        """Yield the tensors of all work items in order, each computed by one process: the same bits on all of them.

        compute: of an item; shapes: of all items. Every process must ask for as many items as the others. The tensors
        are on the CPU, or, of a single process, where they were computed.
        """
        for first in range(0, len(shapes), self.world_size):
            own = first + self.rank
            computed = compute(own) if own < len(shapes) else None
            if self.world_size == 1 and computed is not None:
                yield computed
                continue
            round_of = shapes[first : first + self.world_size]
            yield from self._exchanged_round(computed, round_of, dtype)

    def exchange(self, own: Tensor) -> list[Tensor]:
        """Return the tensors of all processes by rank, bit for bit. They have one shape and dtype, on the CPU."""
        if self.world_size == 1:
            return [own]
        import torch
        from torch import distributed

        sent = own.contiguous().flatten().view(torch.uint8)
        received = [torch.empty_like(sent) for _ in range(self.world_size)]
        with _reported():
            distributed.all_gather(received, sent)
        return [data.view(own.dtype).view(own.shape) for data in received]

    def _exchanged_round(
        self, own: Tensor | None, shapes: Sequence[Sequence[int]], dtype: torch.dtype
    ) -> Iterator[Tensor]:
        """Yield the tensors of the first ranks, one for each shape."""
        import torch

        sizes = [math.prod(shape) for shape in shapes]
        padded = torch.zeros(max(sizes), dtype=dtype)
        if own is not None:
            padded[: own.numel()] = own.cpu().flatten()
        received = self.exchange(padded)
        for data, size, shape in zip(received, sizes, shapes, strict=False):
            yield data[:size].view(*shape)

    def max(self, value: int) -> int:
        """Return the maximum of `value` over all processes."""
        if self.world_size == 1:
            return value
        import torch

        values = torch.zeros(self.world_size, dtype=torch.int64)
        values[self.rank] = value
        return int(self._all_reduce(values).max())

    def sum(self, value: float) -> float:
        """Return the sum of `value` over all processes, the same float64 on each."""
        if self.world_size == 1:
            return value
        import torch

        values = torch.zeros(self.world_size, dtype=torch.float64)
        values[self.rank] = value
        return float(self._all_reduce(values).sum())

    def barrier(self) -> None:
        """Wait until every process has got here."""
        self.max(0)

    def check_same(self, *tensors: Tensor) -> None:
        """Raise RunError on all processes unless they hold the same tensors (on the CPU)."""
        if self.world_size == 1:
            return
        import torch

        data = (tensor.detach().contiguous().flatten().view(torch.uint8).numpy() for tensor in tensors)
        digest = hashlib.sha256(b"".join(map(bytes, data))).digest()
        digests = torch.zeros(self.world_size, 4, dtype=torch.int64)
        digests[self.rank] = torch.frombuffer(bytearray(digest), dtype=torch.int64)
        different = (self._all_reduce(digests) != digests[self.rank]).any(1).nonzero()
        if len(different):
            raise RunError(
                f"rank {self.rank} and rank {int(different[0])} are not running the same search. "
                "Give every process the same files, the same versions and the same kind of device."
            )

    @contextmanager
    def run_writer_first(self) -> Iterator[None]:
        """Run the body on the writer before it runs on the others, which can then read what the writer wrote."""
        if self.is_writer:
            yield
        self.barrier()
        if not self.is_writer:
            yield
        self.barrier()

    def _all_reduce(self, values: Tensor) -> Tensor:
        """Sum `values` over all processes, in place, and return them. Raises RunError if a process has died."""
        from torch import distributed

        with _reported():
            distributed.all_reduce(values)
        return values


ALONE = Ranks()
"""The only process."""


@contextmanager
def _reported() -> Iterator[None]:
    """Raise RunError if a process has died that the body needs."""
    try:
        yield
    except RuntimeError as error:
        raise RunError(f"another process of this run has died ({in_short(error, 160)})") from error


@contextmanager
def join(backend: str = "gloo", common: tuple[type[Exception], ...] = ()) -> Iterator[Ranks]:
    """Connect to the other processes inside the `with`. Raises RunError if they cannot be reached.

    backend: of `torch.distributed`. A training also exchanges gradients, on the GPUs with NCCL: `cpu:gloo,cuda:nccl`.
    common: exceptions that all processes raise at the same time.
    """
    ranks = ranks_from_environment()
    if ranks.world_size == 1:
        yield ranks
        return
    from torch import distributed

    try:
        store = _private_store(ranks)
        distributed.init_process_group(
            backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=TIMEOUT
        )
    except RuntimeError as error:
        raise RunError(f"cannot reach the other processes: {in_short(error, 160)}") from error
    try:
        yield ranks
    except BaseException as error:
        # After a RunError another process may be gone, and torch 2.6 waits for it. NCCL also waits for processes that
        # do not know of the error. This one then ends without goodbye, and torchrun stops the others.
        if isinstance(error, common) or ("nccl" not in backend and not isinstance(error, RunError)):
            distributed.destroy_process_group()
        raise
    distributed.destroy_process_group()


def _private_store(ranks: Ranks) -> Store:
    """Return a store that only the processes of this start share.

    torchrun's own store outlives the processes: after a restart it still holds the addresses of dead ones
    (github.com/pytorch/pytorch/issues/135712). So rank 0 publishes a new random prefix, and each other rank asks to
    join under that prefix until rank 0 answers. A rank 0 that has died never answers.
    """
    from torch import distributed

    store, _, _ = next(distributed.rendezvous("env://"))
    token = uuid4().hex
    if ranks.is_writer:
        private = distributed.PrefixStore(token, store)
        store.set("prefix", token)
        for rank in range(1, ranks.world_size):
            while not private.check([f"request {rank}"]):
                time.sleep(POLL_INTERVAL)  # not `get`, which would block signals while it waits
            private.set(f"answer {private.get(f'request {rank}').decode()}", "")
        return private
    while True:
        if store.check(["prefix"]):
            private = distributed.PrefixStore(store.get("prefix").decode(), store)
            private.set(f"request {ranks.rank}", token)
            if private.check([f"answer {token}"]):
                return private
        time.sleep(POLL_INTERVAL)


def ranks_from_environment() -> Ranks:
    """Return this process's rank from torchrun's variables, or a single process if torchrun did not start it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Ranks()
    return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def ranks_of_this_machine() -> Ranks:
    """Return this process's rank among the processes of this machine only."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Ranks()
    return Ranks(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
