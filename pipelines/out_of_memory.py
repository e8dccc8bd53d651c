"""Recognize out-of-memory errors, on an accelerator and on the CPU.

torch reports them in many ways; here they all become OutOfMemory. The worker decides how to react.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from jobs.errors import OutOfMemory, first_line

P = ParamSpec("P")
T = TypeVar("T")

_SIGNS = (
    "out of memory",
    "not enough memory",  # the CPU allocator on Windows and macOS
    "can't allocate memory",  # the CPU allocator on Linux
    "ALLOC_FAILED",  # cuBLAS and cuDNN workspaces
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that an allocation failed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def reports_out_of_memory(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function to raise OutOfMemory when an allocation inside it fails.

    OutOfMemory is raised after the handler has ended, because torch's error has a traceback that
    keeps the failed call's tensors alive. Once it's gone, the allocator can free their memory.
    """

    @wraps(function)
    def reporting(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            sentence = first_line(error) if str(error) else "out of memory"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise OutOfMemory(sentence)

    return reporting
