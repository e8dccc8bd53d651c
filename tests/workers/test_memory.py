"""What a worker's process does with the memory that its forward passes free."""

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
"""Page faults of twenty tensors of 4 MiB, made and freed, before and after; then frozen objects."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc has other settings")
def test_memory_that_a_forward_pass_frees_is_not_asked_for_again() -> None:
    told = subprocess.run(
        [sys.executable, "-c", ROUNDS], capture_output=True, text=True, check=True
    )
    by_default, settled, frozen = map(int, told.stdout.split())
    assert settled < 100 < by_default
    assert frozen > 10_000
