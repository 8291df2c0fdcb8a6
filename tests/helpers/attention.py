"""What PyTorch's attention does on a CPU, which depends on its version."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode


class _Operators(TorchDispatchMode):
    """Collects the names of the operators that run inside the `with`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@cache
def has_kernel_for_groups() -> bool:
    """Return whether attention with fewer key than query heads has a kernel of its own. In torch 2.6 it has none."""
    query, key = torch.ones(1, 2, 4, 8), torch.ones(1, 1, 4, 8)
    with _Operators() as operators:
        functional.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
    return not any(name.endswith("mm") for name in operators.names)
