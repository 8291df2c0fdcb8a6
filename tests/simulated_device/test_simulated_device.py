"""Every part of a search on simulated devices: tensors of different devices never mix, and no forward pass waits.

No GPU is needed: device.cpp simulates two devices and compiles here in half a minute. The kernels of real devices, and
the memory they take, are tested in tests/gpu.
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
from helpers.fp8 import lacks_fp8
from helpers.simulated_device_parts import PARTS
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
pytestmark = pytest.mark.timeout(600)  # compiling and running all parts takes minutes


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile device.cpp and return the library. Skip where there is no C++ compiler that reads PyTorch's headers."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    output = tmp_path_factory.mktemp("simulated") / "device.so"
    flags = ["-shared", "-fPIC", "-O0", "-std=c++20", f"-D_GLIBCXX_USE_CXX11_ABI={torch.compiled_with_cxx11_abi():d}"]
    command = [compiler, *flags, *(f"-isystem{path}" for path in include_paths())]
    linked = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
    if subprocess.run([*command, str(HERE / "device.cpp"), "-o", str(output), *linked]).returncode:
        headers = ["-fsyntax-only", "-include", "ATen/ATen.h", "-x", "c++", "/dev/null"]
        if subprocess.run([*command, *headers]).returncode:
            pytest.skip("this machine's C++ compiler cannot read PyTorch's headers, or they are missing")
        pytest.fail("device.cpp does not compile")
    return output


@pytest.fixture(scope="module")
def faults(library: Path, token_cache: str) -> dict[str, str]:
    """Run all parts in one process and return the traceback of each, "" if it passed."""
    variables = {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1", "PGPRUNE_CACHE": token_cache}
    command = [sys.executable, str(HERE.parent / "helpers" / "simulated_device_parts.py"), str(library)]
    process = subprocess.run(command, env=os.environ | variables, stdout=subprocess.PIPE, text=True)
    assert process.returncode == 0
    return {row["part"]: row["fault"] for row in map(json.loads, process.stdout.splitlines())}


def test_every_part_works_on_simulated_devices(faults: dict[str, str], subtests: pytest.Subtests) -> None:
    """One test with subtests, so that only one of several test processes compiles the device and runs the parts."""
    assert tuple(faults) == tuple(PARTS)
    for part, fault in faults.items():
        with subtests.test(part):
            if lacks_fp8(fault):
                pytest.skip(f"PyTorch {torch.__version__} cannot multiply fp8 matrices on the CPU")
            if fault:
                pytest.fail(fault, pytrace=False)
