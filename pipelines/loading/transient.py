"""Tell which errors while reading or loading a model may go away on a retry."""

import errno

from pipelines.out_of_memory import is_out_of_memory

TRANSIENT = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.EDQUOT,
        errno.EINTR,
        errno.EIO,
        errno.EMFILE,
        errno.ENETUNREACH,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ENOSPC,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)


def may_pass(error: BaseException | None) -> bool:
    """Whether `error` or one of its causes is transient.

    For example, another process holds the memory, or a disk or connection is failing for a while.
    """
    while error is not None:
        if is_out_of_memory(error) or (isinstance(error, OSError) and error.errno in TRANSIENT):
            return True
        error = error.__cause__ or error.__context__
    return False
