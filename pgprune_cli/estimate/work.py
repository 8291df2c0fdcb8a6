"""What a part of a search takes, and how long that is on a machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from pgprune_cli.estimate.flops import Flops
from pgprune_cli.estimate.machines import CHECKSUM, DISK, HOST_PRODUCTS, OPERATION, PAGEABLE, STAGED, TOKENIZED, Machine
from pgprune_cli.search.phases import Phase


@dataclass(frozen=True)
class Work:
    """What a part of a search takes. All of it runs at the same time, as far as the machine can.

    flops: of matrix products, by dtype; weights: bytes that these read at least; traffic: bytes that everything else
    reads and writes on the device; copied: bytes between the host and the device; staged: those of them that the host
    copies to pinned buffers first; awaited: bytes from or to memory that is not pinned, so that everything
    else waits; disk: bytes read and written; operations: that the host launches; checked: bytes whose checksum the host
    computes; tokenized: tokens that it makes of text; solved: FLOPs of equations that the host solves.
    """

    flops: Flops = field(default_factory=Flops)
    weights: float = 0
    traffic: float = 0
    copied: float = 0
    awaited: float = 0
    disk: float = 0
    operations: float = 0
    checked: float = 0
    tokenized: float = 0
    solved: float = 0
    staged: float = 0

    def __add__(self, other: Work) -> Work:
        """Return both works as one."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in AMOUNTS}
        return Work(self.flops + other.flops, **sums)

    def times(self, factor: float) -> Work:
        """Return this work, done `factor` times."""
        amounts = {name: factor * getattr(self, name) for name in AMOUNTS}
        return Work(Flops({dtype: round(factor * count) for dtype, count in self.flops.items()}), **amounts)

    def divided(self, parts: int, processes: int) -> Work:
        """Return the work of one process, if `parts` equal parts are divided among some processes."""
        return self.times(-(-parts // processes) / parts)


AMOUNTS = tuple(own.name for own in fields(Work))[1:]


@dataclass(frozen=True)
class Seconds:
    """How long each resource of a machine is busy.

    products: matrix products; memory: everything that waits for the device's memory; pcie: copies between the host and
    the device; awaited: those of them for which everything else waits; disk: reading and writing files, with checksums;
    host: launching operations, tokenizing, solving equations.
    """

    products: float
    memory: float
    pcie: float
    awaited: float
    disk: float
    host: float

    @classmethod
    def of(cls, work: Work, machine: Machine) -> Seconds:
        """Return the seconds of some work."""
        products = sum(count / machine.flops_per_second[dtype] for dtype, count in work.flops.items() if count)
        # Weights can take longer to read than to multiply.
        waiting = max(0.0, work.weights / machine.memory_bandwidth - products)
        # One weight is staged while the one before it is copied.
        copying = 0.0 if machine.pcie is None else max(work.copied / machine.pcie, work.staged / STAGED)
        awaited = 0.0 if machine.pcie is None else work.awaited / PAGEABLE
        return cls(
            products,
            work.traffic / machine.memory_bandwidth + waiting,
            copying + awaited,
            awaited,
            work.disk / DISK + work.checked / CHECKSUM,
            work.operations * OPERATION + work.tokenized / TOKENIZED + work.solved / HOST_PRODUCTS,
        )

    def elapsed(self, machine: Machine) -> float:
        """Return how long the work takes.

        A GPU computes while the host launches what comes next and data is copied. A CPU does everything itself.
        """
        device = self.products + self.memory
        own = device + self.host if machine.pcie is None else max(device, self.host)
        return max(own, self.pcie - self.awaited, self.disk) + self.awaited


def phase_seconds(phases: Mapping[Phase, Sequence[Work]], machine: Machine) -> dict[str, dict[str, Any]]:
    """Return by phase its seconds; `bound`, the resource that is busy longest; and how long each resource is busy.

    The parts of a phase run one after another.
    """
    times: dict[str, dict[str, Any]] = {}
    for phase, parts in phases.items():
        own = [Seconds.of(part, machine) for part in parts]
        busy = {name: sum(getattr(seconds, name) for seconds in own) for name in SECONDS}
        elapsed = sum(seconds.elapsed(machine) for seconds in own)
        times[phase] = {"seconds": elapsed, "bound": max(SECONDS, key=lambda name: busy[name]), **busy}
    return times


SECONDS = ("products", "memory", "pcie", "disk", "host")
