"""Who runs on a data folder: the lock that one `up` holds, its address, and who uses it.

    up.lock    held exclusively by the one `up` of the folder, for as long as it lives
    up.users   held shared by each `generate` that works through it; a private `up` that can take
               it exclusively has no users left, and puts itself away
    up.json    the address, written by the holder of up.lock

The locks are the kernel's (flock), so they are gone with their process however it ended. Knows
nothing of what a running `up` does.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from imagemill.client.errors import AlreadyRunning, StartFailed

_COLLISION_SECONDS = 0.5
"""How long a claim is tried at least: a process that only looks holds the lock for an instant."""

_NAMELESS_SECONDS = 30.0
"""How long a claim is tried while no address is known, since an `up` that starts tells it soon."""


@dataclass(frozen=True, slots=True)
class Record:
    """A running `up`: its process and address; `private` ones end with their last user."""

    pid: int
    url: str
    private: bool


@contextmanager
def claimed(data: Path) -> Iterator[None]:
    """Be the one `up` of the folder; raises AlreadyRunning where there is one already."""
    descriptor = _open(data, "up.lock")
    try:
        began = time.monotonic()
        while not _try(descriptor, fcntl.LOCK_EX):
            limit = _COLLISION_SECONDS if _read(data) else _NAMELESS_SECONDS
            if time.monotonic() - began > limit:
                raise AlreadyRunning(_already(data))
            time.sleep(0.02)
        withdraw(data)
        try:
            yield
        finally:
            withdraw(data)
    finally:
        os.close(descriptor)


def _already(data: Path) -> str:
    record = _read(data)
    at = f" at {record.url} (process {record.pid})" if record else ""
    until = ", for a `generate` and no longer than that" if record and record.private else ""
    return f"imagemill is already running on {data}{at}{until}"


def announce(data: Path, record: Record) -> None:
    """Write the address for others to find; only the holder of `claimed` may."""
    temporary = data / f"up.json.{os.getpid()}"
    temporary.write_text(json.dumps(asdict(record)))
    temporary.replace(data / "up.json")


def withdraw(data: Path) -> None:
    """Take the address back: this `up` is ending, and nobody should come to it any more."""
    (data / "up.json").unlink(missing_ok=True)


def running(data: Path) -> Record | None:
    """The `up` that runs on the folder now and has told its address, if there is one."""
    return _read(data) if is_held(data / "up.lock") else None


def _read(data: Path) -> Record | None:
    try:
        return Record(**json.loads((data / "up.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def is_held(lock: Path) -> bool:
    """Whether some process holds that lock file exclusively at this moment."""
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _try(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


class Users:
    """The users' lock of a folder; `leave`, or let the process end, to give it up."""

    def __init__(self, data: Path) -> None:
        self._descriptor = _open(data, "up.users")

    def join(self) -> bool:
        """Become a user; False while a private `up` is putting itself away: try again."""
        return _try(self._descriptor, fcntl.LOCK_SH)

    def is_empty(self) -> bool:
        """Whether there is no user; if so, none can join until this is left."""
        return _try(self._descriptor, fcntl.LOCK_EX)

    def leave(self) -> None:
        """Give the lock up."""
        os.close(self._descriptor)


def is_used(data: Path) -> bool:
    """Whether anyone uses the private `up` of the folder; False too while it is ending.

    Another process that looks at the same instant is taken for a user.
    """
    users = Users(data)
    try:
        return not users.is_empty() and users.join()
    finally:
        users.leave()


def _open(data: Path, name: str) -> int:
    try:
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        return os.open(data / name, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StartFailed(f"cannot use the data folder {data}: {error.strerror}") from error


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
