"""Counts the bytes that a computation allocates, tensor by tensor, independently of the allocator."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Inside the `with`, counts the bytes of new tensors that are alive.

    peak: the most at any time; largest: those of the largest tensor. Older tensors, tensors on the meta device, views
    and the memory that an operator uses internally are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = self.largest = 0
        self.known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage(), 0)
        with self:  # in inference mode, an operator made of others arrives as one
            result = func.decompose(*args, **(kwargs or {}))
        if result is NotImplemented:
            result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self._note(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return result

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self.known:
            return

        def free(_: object) -> None:
            del self.known[key]
            self.alive -= size

        self.known[key] = weakref.ref(storage, free)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        self.largest = max(self.largest, size)
