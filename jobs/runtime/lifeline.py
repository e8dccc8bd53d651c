"""Children that learn of their parent's death, however it came, even by SIGKILL.

The parent holds the writing end of a pipe and never writes; the child watches the reading end.
The kernel closes the writing end when the parent is gone, and the child reads end-of-file. POSIX
only. Knows nothing of what the processes do, and does not restart anything.
"""

import os
import stat
import subprocess
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

LIFELINE = "IMAGEMILL_LIFELINE_FD"
"""Environment variable `FD:INODE`: the reading end, and the pipe's inode, so that a process which
inherited the variable but not the descriptor does not watch a stranger's file."""


def spawn(argv: Sequence[str], **kwargs: Any) -> subprocess.Popen[Any]:
    """`subprocess.Popen(argv, **kwargs)` whose child can `watch` this process.

    The line is cut when this process ends, or when the returned object is garbage-collected:
    keep it. The line survives an exec in the child. A process forked without exec (the fork
    start method of multiprocessing) would hold the line open too; use spawn there.
    """
    reading, writing = os.pipe()
    try:
        given = kwargs.pop("env", None)
        env = dict(os.environ if given is None else given)
        env[LIFELINE] = f"{reading}:{os.fstat(reading).st_ino}"
        passed = (*kwargs.pop("pass_fds", ()), reading)
        process = subprocess.Popen(list(argv), env=env, pass_fds=passed, **kwargs)
    except BaseException:
        os.close(writing)
        raise
    finally:
        os.close(reading)
    weakref.finalize(process, os.close, writing)
    return process


def watch(on_parent_death: Callable[[], object]) -> bool:
    """Call `on_parent_death` once, in a daemon thread, when the process that spawned us is gone.

    Returns False, and watches nothing, where this process was not started by `spawn`.
    """
    reading = _inherited()
    if reading is None:
        return False

    def wait_for_the_end() -> None:
        while os.read(reading, 1):
            continue
        on_parent_death()

    threading.Thread(target=wait_for_the_end, name="lifeline", daemon=True).start()
    return True


def _inherited() -> int | None:
    """The reading end that `spawn` passed to this very process, if it did."""
    number, _, inode = os.environ.get(LIFELINE, "").partition(":")
    if not (number.isdecimal() and inode.isdecimal()):
        return None
    try:
        found = os.fstat(int(number))
    except OSError:
        return None
    is_ours = stat.S_ISFIFO(found.st_mode) and found.st_ino == int(inode)
    return int(number) if is_ours else None
