"""Which errors in reading or loading a model may be gone at the next try, with the same files."""

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

    That is memory which another process holds, or a disk or connection that fails for a while.
    """
    while error is not None:
        if is_out_of_memory(error) or (isinstance(error, OSError) and error.errno in TRANSIENT):
            return True
        error = error.__cause__ or error.__context__
    return False
