"""Memory settings of a worker's process, made once after the model is loaded.

Both settings only save time: they change no result.
"""

import ctypes
import gc
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's mallopt(3)."""

LARGEST_KEPT = 32 * 2**20
"""Bytes of the largest freed block that's kept: the most that glibc accepts."""


def settle(device: str) -> None:
    """Exclude loaded objects from garbage collection, and keep memory that passes free.

    Walking the libraries' objects took up to a sixth of the time of small forward passes.
    """
    # Collect first, because freeze() would keep today's garbage for the life of the process.
    gc.collect()
    gc.freeze()
    # On an accelerator, activations come from torch's own caching allocator, which keeps memory.
    if device == "cpu":
        keep_freed()


def keep_freed() -> bool:
    """Make malloc keep freed blocks; True if that worked, which needs glibc.

    By default malloc returns a pass's larger tensors to the system after each use, and the system
    then has to clear every page again. That took a tenth of the time at buckets of 8.
    """
    # A block above the mmap threshold is mapped and unmapped each time, and the top of the heap is
    # returned once it exceeds the trim threshold. So both have to be raised.
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
