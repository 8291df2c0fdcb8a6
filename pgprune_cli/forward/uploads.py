"""How the repaired weights of a width table get to the GPUs: some stay there, others arrive just before their block.

All of them are mapped from files, so the processes of one machine share the pages. The steps of a search keep as many
on the GPUs as fit, spread evenly over the layers. The others pass through a ring of a few buffers: while a block
computes, a thread fills the next pinned buffer, and a stream of its own copies it to the GPU. Nothing else of the table
is pinned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pgprune_cli.console.stderr import warn
from pgprune_cli.model.masks import RepairedBlocks
from pgprune_cli.model.out_of_memory import is_out_of_memory

SLOTS = 3
"""Buffers of a ring: one weight is used, and two are on their way."""

Key = tuple[int, str]


class Lane(Protocol):
    """Some buffers on the host, each with one on a device."""

    def copy(self, slot: int, weight: Tensor) -> None:
        """Copy a host weight through a slot, once the device has used what is in it. Called from a thread."""

    def arrived(self, slot: int, weight: Tensor) -> Tensor:
        """Return the device's copy of a weight in a slot. What is launched from now on waits for it."""

    def used(self, slot: int) -> None:
        """Note that everything launched before may still read the slot."""


class CudaLane:
    """The lane of a GPU. Events order copies and computation.

    The thread that launches forward passes waits only for the thread that copies: while a weight is still read from its
    file, or while the GPU still receives the one that was in the pinned buffer before, three uploads earlier.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        """Allocate the buffers, for weights of up to `size` bytes."""
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._host = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(SLOTS)]
        # What was launched before may still use the memory that the buffers now have.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._copied = [torch.cuda.Event(blocking=True) for _ in range(SLOTS)]  # waiting leaves the core to others
        self._used = [torch.cuda.Event() for _ in range(SLOTS)]

    def copy(self, slot: int, weight: Tensor) -> None:
        self._copied[slot].synchronize()  # the last copy may still read the pinned buffer
        staged = _elements(self._host[slot], weight)
        staged.copy_(_flat(weight))
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_event(self._used[slot])
            _elements(self._buffers[slot], weight).copy_(staged, non_blocking=True)
            self._copied[slot].record(self._stream)

    def arrived(self, slot: int, weight: Tensor) -> Tensor:
        torch.cuda.current_stream(self._device).wait_event(self._copied[slot])
        return _elements(self._buffers[slot], weight).as_strided(weight.shape, weight.stride())

    def used(self, slot: int) -> None:
        self._used[slot].record(torch.cuda.current_stream(self._device))

    def close(self) -> None:
        """Wait for the copies, so that the buffers can be freed."""
        self._stream.synchronize()


def _flat(weight: Tensor) -> Tensor:
    """Return the elements of a dense weight in the order in which they lie in memory."""
    return weight.as_strided((weight.numel(),), (1,))


def _elements(buffer: Tensor, weight: Tensor) -> Tensor:
    """Return the part of a buffer of bytes that holds the elements of a weight."""
    return buffer[: weight.nbytes].view(weight.dtype)


class Uploads:
    """The weights of a table on their way to the devices of their blocks, for as long as the table is used."""

    def __init__(
        self,
        weights: Mapping[Key, Sequence[Tensor]],
        devices: Mapping[Key, torch.device],
        rooms: Mapping[torch.device, int],
        new_lane: Callable[[torch.device, int], Lane],
    ) -> None:
        """Place the weights.

        weights: by (layer, block) in the order in which the blocks run, those of all widths, on the host; devices:
        where each block is; rooms: the bytes that weights may take on each device; new_lane: makes the lane of a
        device, for weights of up to some bytes.
        """
        self._weights, self._devices, self._new_lane = weights, devices, new_lane
        self._resident: dict[int, Tensor] = {}  # by the id of the host's weight, which `_weights` keeps alive
        self._lanes: dict[torch.device, Lane] = {}
        for device, room in rooms.items():
            self._place(device, room)
        self._worker = ThreadPoolExecutor(max_workers=1)

    def _place(self, device: torch.device, room: int) -> None:
        """Keep the weights of some blocks on a device, and open a lane for the others."""
        blocks = self._blocks_on(device)
        sizes = [sum(weight.nbytes for weight in block) for block in blocks]
        if sum(sizes) > room:
            room -= self._open_lane(device)
        kept = [weight for block, fits in zip(blocks, evenly(sizes, room), strict=True) if fits for weight in block]
        try:
            self._resident |= {id(weight): weight.to(device) for weight in kept}
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        else:
            return
        self._upload_all(device)  # something else takes the memory

    def _blocks_on(self, device: torch.device) -> list[Sequence[Tensor]]:
        return [block for key, block in self._weights.items() if self._devices[key] == device]

    def _open_lane(self, device: torch.device) -> int:
        """Open a lane and return the bytes that it takes on the device: 0 if there is no memory for it.

        The weights of blocks without a lane are copied when the blocks run.
        """
        largest = max(weight.nbytes for block in self._blocks_on(device) for weight in block)
        try:
            with torch.inference_mode(False):  # otherwise the thread could not write to the buffers
                self._lanes[device] = self._new_lane(device, largest)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            warn(f"{device}: no memory to copy the width table ahead of time. Blocks wait for it, which takes longer.")
            return 0
        return SLOTS * largest

    @property
    def keeps_weights(self) -> bool:
        """Return whether any weights are kept on a device."""
        return bool(self._resident)

    def make_room(self) -> None:
        """Free the weights that are kept on the devices. From now on, all are uploaded."""
        devices = dict.fromkeys(weight.device for weight in self._resident.values())
        self._resident.clear()
        for device in devices:
            self._upload_all(device)

    def _upload_all(self, device: torch.device) -> None:
        warn(f"{device}: out of memory. The width table is copied there in every forward pass, which takes longer.")
        if device not in self._lanes:
            self._open_lane(device)

    @contextmanager
    def during(self, repaired: RepairedBlocks) -> Iterator[tuple[RepairedBlocks, Mapping[Key, Upload]]]:
        """Start to upload the weights of one mask, which is evaluated inside the `with`.

        repaired: of blocks that all run, in this order. Yields the repaired blocks with weights on their devices as far
        as they are kept there, and for the others their upload.
        """
        placed, coming = dict(repaired), dict[torch.device, list[Key]]()
        for key, block in repaired.items():
            resident = self._resident.get(id(block.weight))
            if resident is not None:
                placed[key] = block._replace(weight=resident)
            elif self._devices.get(key) in self._lanes:
                coming.setdefault(self._devices[key], []).append(key)
        uploads: dict[Key, Upload] = {}
        with ExitStack() as passes:
            for device, keys in coming.items():
                ring = Ring(self._lanes[device], [repaired[key].weight for key in keys], self._worker)
                passes.callback(ring.close)
                uploads |= {key: Upload(ring, place) for place, key in enumerate(keys)}
            yield placed, uploads

    def close(self) -> None:
        """Free what is kept on the devices."""
        self._worker.shutdown()
        for lane in self._lanes.values():
            if isinstance(lane, CudaLane):
                lane.close()
        self._lanes.clear()
        self._resident.clear()


class Ring:
    """The weights of one forward pass on one lane, each taken once and in order, a few ahead."""

    def __init__(self, lane: Lane, weights: Sequence[Tensor], worker: ThreadPoolExecutor) -> None:
        self._lane, self._weights, self._worker = lane, weights, worker
        self._coming: dict[int, Future[None]] = {}  # by place: the copies of weights that have not arrived yet
        self._taken: set[int] = set()
        for place in range(SLOTS):
            self._start(place)

    def _start(self, place: int) -> None:
        if place < len(self._weights):
            self._coming[place] = self._worker.submit(self._lane.copy, place % SLOTS, self._weights[place])

    def take(self, place: int) -> Tensor:
        """Return a weight on the device. Nothing that is launched after it runs before the weight has arrived."""
        slot = place % SLOTS
        self._coming[place].result()  # an interruption leaves it there, so that `close` waits for it
        del self._coming[place]
        self._taken.add(slot)
        return self._lane.arrived(slot, self._weights[place])

    def release(self, place: int) -> None:
        """Let another weight take the slot, once the device has used this one."""
        slot = place % SLOTS
        self._taken.discard(slot)
        self._lane.used(slot)
        self._start(place + SLOTS)

    def close(self) -> None:
        """Wait until nothing is written to the buffers any more.

        Copies that nobody took may have failed: the pass has stopped with an error of its own.
        """
        wait(self._coming.values())
        for slot in self._taken:  # the pass has failed in a block
            self._lane.used(slot)


class Upload(NamedTuple):
    """One weight of a ring."""

    ring: Ring
    place: int

    def take(self) -> Tensor:
        """Return the weight on the device: see `Ring.take`."""
        return self.ring.take(self.place)

    def release(self) -> None:
        """Say that everything that reads the weight has been launched."""
        self.ring.release(self.place)


def evenly(sizes: Sequence[int], room: int) -> list[bool]:
    """Return which of some consecutive items to take so that they fit `room`, spread evenly over all of them.

    Among the first k items, the taken ones use at most those items' share of the room.
    """
    total, seen, taken = sum(sizes), 0, 0
    chosen = []
    for size in sizes:
        seen += size
        fits = (taken + size) * total <= seen * min(room, total)
        taken += size * fits
        chosen.append(fits)
    return chosen
