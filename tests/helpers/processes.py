"""Threads in place of the processes of a search: they exchange tensors as processes do, and run one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from pgprune_cli.distributed import Ranks

Result = TypeVar("Result")

SECONDS = 30
"""A thread that waits for another for so long fails."""


@dataclass(frozen=True)
class _Meeting:
    """Where threads exchange tensors. turn: held by the thread that runs."""

    barrier: threading.Barrier
    sent: list[Tensor]
    turn: threading.Lock = field(default_factory=threading.Lock)

    def wait(self) -> None:
        """Let the others run until all are here."""
        self.turn.release()
        try:
            self.barrier.wait(SECONDS)
        finally:
            self.turn.acquire()


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """The rank of a thread among all of them."""

    meeting: _Meeting = field(default_factory=lambda: _Meeting(threading.Barrier(1), [torch.empty(0)]))

    def exchange(self, own: Tensor) -> list[Tensor]:
        """Return the tensors of all threads by rank."""
        self.meeting.sent[self.rank] = own.clone()
        self.meeting.wait()
        received = [tensor.clone() for tensor in self.meeting.sent]
        self.meeting.wait()
        assert {(tensor.shape, tensor.dtype) for tensor in received} == {(own.shape, own.dtype)}
        return received

    def _all_reduce(self, values: Tensor) -> Tensor:
        return values.copy_(torch.stack(self.exchange(values)).sum(0))


def run_together(world: int, work: Callable[[Ranks], Result]) -> list[Result]:
    """Return what `work` returns on every one of `world` ranks. The first error of any of them is raised."""
    meeting = _Meeting(threading.Barrier(world), [torch.empty(0)] * world)
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        with meeting.turn:
            try:
                results[rank] = work(ThreadRanks(rank, world, meeting))
            except BaseException as error:
                errors.append(error)
                meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(world)]
