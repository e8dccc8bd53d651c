"""What running out of memory looks like, on an accelerator and on the CPU.

Turns torch's many ways to say it into the one OutOfMemory that the worker knows. Knows nothing of
models; what to do about it, the worker decides.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from jobs.errors import OutOfMemory

P = ParamSpec("P")
T = TypeVar("T")

_SIGNS = (
    "out of memory",
    "not enough memory",  # the CPU allocator on Windows and macOS
    "can't allocate memory",  # the CPU allocator on Linux
    "ALLOC_FAILED",  # cuBLAS and cuDNN work spaces
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def reports_out_of_memory(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function to raise OutOfMemory when an allocation inside it fails.

    OutOfMemory is raised after the handler has ended: the torch error's traceback, which keeps the
    failed call's tensors alive, is gone by then, and the allocator can give their memory back.
    """

    @wraps(function)
    def reporting(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            sentence = (str(error) or "out of memory").splitlines()[0]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise OutOfMemory(sentence)

    return reporting
