"""The matrix rate, against a clock that is made up."""

import itertools

import pytest
import torch

from pgprune_cli.estimate import matmul_rate as module
from pgprune_cli.estimate.matmul_rate import LONG_ENOUGH, matmul_rate


def test_the_rate_is_that_of_the_fastest_product_at_its_best_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each size: a warm-up and three products; the products of the second size take long enough."""
    taken = itertools.chain([1, 400, 200, 300], [1, 3 * LONG_ENOUGH, LONG_ENOUGH, 2 * LONG_ENOUGH])
    readings = itertools.chain.from_iterable((0, nanoseconds) for nanoseconds in taken)
    monkeypatch.setattr(module, "synchronised_clock", lambda device: next(readings))
    monkeypatch.setattr(module, "SMALLEST", 4)
    assert matmul_rate(torch.device("cpu"), torch.float32) == 2 * 4**3 / 200e-9
    assert next(readings, None) is None


def test_sizes_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALLEST", 4)
    monkeypatch.setattr(module, "synchronised_clock", lambda device: 0)
    assert matmul_rate(torch.device("cpu"), torch.float64, largest=16) == pytest.approx(2 * 16**3 * 1e9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_this_machine_has_a_rate(dtype: torch.dtype) -> None:
    assert 1e6 < matmul_rate(torch.device("cpu"), dtype, largest=512) < 1e15
