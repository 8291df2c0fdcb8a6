"""FLOPs of whatever runs, as torch counts them, with those of solvers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


def _each(a: Any) -> int:
    """Matrices in a batch of them."""
    return a[0] if len(a) == 3 else 1


SOLVERS: dict[Any, Callable[..., int]] = {
    # What torch's counter does not know, by textbook, attention without the keys that are not seen. Shapes come in.
    aten.addmm_: lambda _, a, b, *x, **k: 2 * a[0] * a[1] * b[1],
    aten.linalg_cholesky_ex: lambda a, *x, **k: _each(a) * a[-1] ** 3 // 3,
    aten.cholesky_inverse: lambda a, *x, **k: 2 * a[-1] ** 3 // 3,
    aten.linalg_solve_triangular: lambda a, b, *x, **k: _each(a) * a[-1] ** 2 * b[-1],
    aten.cholesky_solve: lambda b, a, *x, **k: _each(a) * 2 * a[-1] ** 2 * b[-1],
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *x, **kw: 4 * q[0] * q[1] * q[3] * _seen(q[2], k[2]),
}


def _seen(queries: int, keys: int) -> int:
    """Return how many keys the last `queries` of `keys` positions see together."""
    return queries * (keys - queries) + queries * (queries + 1) // 2


class NoModules:
    """Takes the place of torch's tracker of modules, which does not allow torch.autograd.grad."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def counted(run: Callable[[], object]) -> int:
    """Return the FLOPs of `run`."""
    counter = FlopCounterMode(display=False, custom_mapping=SOLVERS)
    counter.mod_tracker = NoModules()
    with counter:
        run()
    return counter.get_total_flops()
