"""The tests at real size are right: on a CPU and at small size they pass, but for what only CUDA has."""

import os
import subprocess
import sys
from pathlib import Path


def test_the_tests_at_real_size_pass_at_small_size() -> None:
    """`live` is left out: tests/recover has it, and it takes seconds."""
    tests = Path(__file__).with_name("test_real_size.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests), "-k", "not live"]
    environment = os.environ | {"GPU_TESTS_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tests.parents[2], check=False)
    assert ended.returncode == 0, ended.stdout
    assert " passed" in ended.stdout
