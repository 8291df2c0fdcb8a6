"""The Triton kernel of scripts/bench/gather_gemm.py computes the right products: on the CPU, interpreted."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pgprune_cli.model.masks import columns_of

pytest.importorskip("triton", reason="Triton is not installed: it comes with PyTorch's CUDA builds")
BENCHES = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import the benchmark with an interpreted kernel; Triton decides that when the kernel is defined."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.syspath_prepend(str(BENCHES))
    monkeypatch.delitem(sys.modules, "gather_gemm", raising=False)
    module = importlib.import_module("gather_gemm")
    monkeypatch.delitem(sys.modules, "gather_gemm")
    return module


@pytest.mark.parametrize(("axis", "units", "width"), [(0, 90, 1), (1, 90, 1), (0, 5, 16), (1, 5, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kept", [1, 3, 4])
def test_gather_matmul_equals_copying_the_kept_units(
    bench: ModuleType, axis: int, units: int, width: int, dtype: torch.dtype, kept: int
) -> None:
    """The sizes do not fill whole tiles, and the last unit is kept."""
    generator = torch.Generator().manual_seed(0)
    units_kept = torch.cat(
        [torch.randperm(units - 1, generator=generator)[: kept - 1].sort().values, torch.tensor([-1])]
    )
    units_kept = units_kept % units
    shape = (units * width, 70) if axis == 0 else (70, units * width)
    weight = torch.randn(shape, generator=generator).to(dtype)
    x = torch.randn(67, 70 if axis == 0 else kept * width, generator=generator).to(dtype)
    product = bench.gather_matmul(x, weight, columns_of(units_kept, width), axis, bench.Tile(32, 64, 32, 4))
    expected = bench.copied_matmul(x.float(), weight.float(), units_kept, axis, units)
    assert product.dtype == dtype and product.shape == expected.shape
    torch.testing.assert_close(product.float(), expected, rtol=1e-5 if dtype == torch.float32 else 2e-3, atol=1e-2)


def test_benchmark_prints_a_row_for_every_projection(bench, monkeypatch, capsys) -> None:
    words = ["tiny", "--repeats", "1", "--batch", "1", "--seqlen", "8", "--dtype", "float32", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["gather_gemm", *words, "--keep", "0.5"])
    monkeypatch.setattr(bench, "TILES", (bench.Tile(16, 64, 32, 4),))
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[3:]] == ["q", "k", "o", "gate", "down"]


def test_benchmark_needs_a_gpu(bench, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gather_gemm", "tiny", "--device", "cpu"])
    monkeypatch.setattr(bench.triton.knobs.runtime, "interpret", False)
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        bench.main()
