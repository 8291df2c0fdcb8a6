"""Memory that was given back is used again without new pages."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys
from pgprune_cli.model.allocator import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
if sys.argv[1] == "keep":
    keep_freed_memory()
for round in range(10):
    if round == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(20 * 2**20) for _ in range(3)]
    for block in blocks:
        ctypes.memset(block, 1, 20 * 2**20)
    for block in blocks:
        libc.free(block)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() // 2**20)
"""


def megabytes_of_new_pages(argument: str, **environment: str) -> int:
    """Return what nine rounds of writing to 60 MB and freeing them take, after a first one."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, argument],
        env={**own, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these limits")
def test_freed_memory_is_used_again_without_new_pages() -> None:
    assert megabytes_of_new_pages("keep") < 20
    assert megabytes_of_new_pages("leave") > 300


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these limits")
def test_limits_of_the_environment_stay() -> None:
    assert megabytes_of_new_pages("keep", MALLOC_TRIM_THRESHOLD_="0") > 300
