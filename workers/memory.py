"""How a worker's process keeps its memory while it serves: settled once, when the model is loaded.

Both settings only save time. Knows no model and no queue.
"""

import ctypes
import gc
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's names for mallopt(3): M_TRIM_THRESHOLD and M_MMAP_THRESHOLD."""

LARGEST_KEPT = 32 * 2**20
"""Bytes of the largest block that is kept when it is freed; glibc takes no more."""


def settle(device: str) -> None:
    """Set aside what is loaded by now, and keep the memory that forward passes free.

    The interpreter's collector need not walk the libraries again and again: with them, it took up
    to a sixth of the time of small forward passes.
    """
    gc.collect()
    gc.freeze()
    if device == "cpu":
        keep_freed()


def keep_freed() -> bool:
    """Have malloc keep freed blocks; whether it does, which takes glibc.

    Otherwise it gives a forward pass's larger tensors back to the system after each use, which
    then has to clear every page again: a tenth of the time at buckets of 8.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
