"""Every part of a search on devices that are not the host's: nothing is mixed up, and nothing waits inside a forward.

No GPU is needed: the devices are made up (device.cpp), compiled here in half a minute. What they cannot show is what the
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
from helpers.simulated_device_parts import PARTS
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
pytestmark = pytest.mark.timeout(600)  # of the first test, for which all is compiled and run


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    made = tmp_path_factory.mktemp("chip") / "device.so"
    flags = ["-shared", "-fPIC", "-O0", "-std=c++20", f"-D_GLIBCXX_USE_CXX11_ABI={torch.compiled_with_cxx11_abi():d}"]
    command = [compiler, *flags, *(f"-isystem{path}" for path in include_paths())]
    linked = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
    if subprocess.run([*command, str(HERE / "device.cpp"), "-o", str(made), *linked]).returncode:
        headers = ["-fsyntax-only", "-include", "ATen/ATen.h", "-x", "c++", "/dev/null"]
        if subprocess.run([*command, *headers]).returncode:
            pytest.skip("the C++ compiler of this machine does not read PyTorch's headers, or they are absent")
        pytest.fail("device.cpp does not compile")
    return made


@pytest.fixture(scope="module")
def said(library: Path, token_cache: str) -> dict[str, str]:
    """Of every part what went wrong, "" for nothing."""
    more = {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1", "PGPRUNE_CACHE": token_cache}
    command = [sys.executable, str(HERE.parent / "helpers" / "simulated_device_parts.py"), str(library)]
    run = subprocess.run(command, env=os.environ | more, stdout=subprocess.PIPE, text=True)
    assert run.returncode == 0
    return {row["part"]: row["said"] for row in map(json.loads, run.stdout.splitlines())}


def test_every_part_runs_on_devices_of_their_own(said: dict[str, str]) -> None:
    """One test, so that of several processes only one compiles and runs it all."""
    assert tuple(said) == tuple(PARTS)
    if faults := [f"{part}: {fault}" for part, fault in said.items() if fault]:
        pytest.fail("\n".join(faults), pytrace=False)
