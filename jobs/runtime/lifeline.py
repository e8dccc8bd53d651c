"""Lets child processes notice when their parent dies, even by SIGKILL.

The parent holds the write end of a pipe and never writes; the child watches the read end. When the
parent is gone, the kernel closes the write end and the child reads end-of-file. POSIX only. This
module restarts nothing.
"""

import os
import stat
import subprocess
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

LIFELINE = "IMAGEMILL_LIFELINE_FD"
"""Environment variable `FD:INODE`: the read end, and the pipe's inode. The inode keeps a process
that inherited the variable, but not the descriptor, from watching an unrelated file."""


def spawn(argv: Sequence[str], **kwargs: Any) -> subprocess.Popen[Any]:
    """`subprocess.Popen(argv, **kwargs)` whose child can `watch` this process.

    The pipe closes when this process ends, or when the returned object is garbage-collected, so
    keep a reference. The child can exec another program. A process forked without exec (the fork
    start method of multiprocessing) would hold the pipe open too; use spawn there.
    """
    read_end, write_end = os.pipe()
    try:
        base = kwargs.pop("env", None)
        env = dict(os.environ if base is None else base)
        env[LIFELINE] = f"{read_end}:{os.fstat(read_end).st_ino}"
        descriptors = (*kwargs.pop("pass_fds", ()), read_end)
        process = subprocess.Popen(list(argv), env=env, pass_fds=descriptors, **kwargs)
    except BaseException:
        os.close(write_end)
        raise
    finally:
        os.close(read_end)
    weakref.finalize(process, os.close, write_end)
    return process


def watch(on_parent_death: Callable[[], object]) -> bool:
    """Call `on_parent_death` once, in a daemon thread, when the process that spawned us is gone.

    Returns False, and watches nothing, if this process wasn't started by `spawn`.
    """
    read_end = _inherited()
    if read_end is None:
        return False

    def wait_for_eof() -> None:
        while os.read(read_end, 1):
            continue
        on_parent_death()

    threading.Thread(target=wait_for_eof, name="lifeline", daemon=True).start()
    return True


def _inherited() -> int | None:
    """The read end that `spawn` passed to this process, if any."""
    number, _, inode = os.environ.get(LIFELINE, "").partition(":")
    if not (number.isdecimal() and inode.isdecimal()):
        return None
    try:
        status = os.fstat(int(number))
    except OSError:
        return None
    is_ours = stat.S_ISFIFO(status.st_mode) and status.st_ino == int(inode)
    return int(number) if is_ours else None
