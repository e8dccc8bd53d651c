"""What a worker's process does with memory that forward passes free."""

import platform
import subprocess
import sys

import pytest

ROUNDS = """
import gc, resource, torch
from workers import memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2**20) for _ in range(20)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(), faults()
by_default = faults()
memory.settle("cpu")
faults(), faults()
print(by_default, faults(), gc.get_freeze_count())
"""
"""Prints page faults of creating twenty 4 MiB tensors before and after, and frozen objects."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other mallocs have other settings")
def test_freed_memory_is_kept() -> None:
    result = subprocess.run(
        [sys.executable, "-c", ROUNDS], capture_output=True, text=True, check=True
    )
    by_default, settled, frozen = map(int, result.stdout.split())
    assert settled < 100 < by_default
    assert frozen > 10_000
