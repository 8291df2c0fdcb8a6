"""What the tests on CUDA devices share."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pgprune_cli.recipe.reader import find, load
from pgprune_cli.recipe.schema import Recipe

DEVICE = os.environ.get("GPU_TESTS_DEVICE", "cuda")
"""Where the tests at real size run. `cpu` runs them at small size, to test the tests themselves."""

needs_cuda = pytest.mark.skipif(
    DEVICE != "cuda" or not torch.cuda.is_available(), reason="no CUDA device on this machine"
)

SHAPES = {
    "cuda": {
        "11008": {"hidden": 4096, "channels": 11008, "heads": 32, "kv_heads": 32},
        "14336": {"hidden": 4096, "channels": 14336, "heads": 32, "kv_heads": 8},
    },
    "cpu": {"small": {"hidden": 64, "channels": 224, "heads": 8, "kv_heads": 2}},
}[DEVICE]
"""The shapes of the layers at real size, those of LLaMA-7B and Llama-3-8B."""

OVERRIDES = (
    "dtype=bfloat16",
    "budget.sparsity=0.5",
    "calibration.windows=32",
    "calibration.heldout=8",
    "scores.windows=32",
    "scores.seqlen=1024",
    "search.policy=widths",
    "search.objective=kl",
    "search.forward_passes=32",
    "search.masks_per_step=8",
    "repair.method=least-squares",
    "repair.windows=256",
    "recover.tokens=4096",
    "recover.heldout=4",
)
"""A short search at real size. Every fit reads twice as many tokens as a layer has channels."""


@dataclass(frozen=True)
class OneLayer:
    """A folder with a model of one layer and random weights, and with a text of random words."""

    folder: Path
    hidden: int
    channels: int

    def recipe(self, *overrides: str) -> Recipe:
        """Return the recipe of a short search, with further overrides as for `--set`."""
        files = (f"model={self.folder / 'model'}", f"calibration.corpus={self.folder / 'text.txt'}")
        return load(find("demo"), [*OVERRIDES, *files, f"device={DEVICE}", *overrides])


def write_one_layer(folder: Path, shape: str) -> OneLayer:
    """Write the model and the text, as `make bench-gpu` does."""
    sizes = SHAPES[shape]
    bench = bench_module()
    config = bench.llama_config({**sizes, "vocab": 2000, "layers": 1})
    bench.write_model(folder / "model", config, torch.device(DEVICE))
    layer = OneLayer(folder, sizes["hidden"], sizes["channels"])
    (folder / "text.txt").touch()
    bench.write_text(folder / "text.txt", layer.recipe(), config.vocab_size)
    return layer


def bench_module() -> ModuleType:
    """Import scripts/bench/gpu.py."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))
    try:
        return importlib.import_module("gpu")
    finally:
        del sys.path[0]


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Raise RuntimeError if the host waits for the GPU inside the `with`."""
    torch.cuda.synchronize()
    _set_sync_debug_mode("error")
    try:
        yield
    finally:
        _set_sync_debug_mode("default")


def _set_sync_debug_mode(mode: str) -> None:
    """Set the mode without PyTorch's warning that it is a prototype, which would be an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)
