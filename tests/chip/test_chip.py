"""Every part of a search on devices that are not the host's: nothing is mixed up, and nothing waits inside a forward.

No GPU is needed: the devices are made up (chip.cpp), compiled here in half a minute. What they cannot show is what the
kernels of real ones compute and take: tests/gpu.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
PARTS = (
    "what is refused",
    "forwards",
    "scores",
    "a search over units",
    "a search over units, repaired by biases",
    "a search over layers",
    "a search over widths",
    "a search over widths in bfloat16",
    "a search over widths from int8",
    "a search over widths from fp8",
    "a search over units on two",
    "a search over widths on two",
    "untied on two",
    "latencies",
)


pytestmark = pytest.mark.timeout(600)  # of the first test, for which all is compiled and run


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of every part what went wrong, "" for nothing."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    library = tmp_path_factory.mktemp("chip") / "chip.so"
    flags = ["-shared", "-fPIC", "-O0", "-std=c++20", f"-D_GLIBCXX_USE_CXX11_ABI={torch.compiled_with_cxx11_abi():d}"]
    places = [f"-isystem{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    command = [compiler, *flags, *places, str(HERE / "chip.cpp"), "-o", str(library), "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True)
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(HERE / "parts.py"), str(library)], env=environment, stdout=subprocess.PIPE, text=True
    )
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0
    return {row["part"]: row["said"] for row in found}


def test_all_parts_ran(said: dict[str, str]) -> None:
    assert tuple(said) == PARTS


@pytest.mark.parametrize("part", PARTS)
def test_it_runs_on_a_device_of_its_own(part: str, said: dict[str, str]) -> None:
    assert said[part] == ""
