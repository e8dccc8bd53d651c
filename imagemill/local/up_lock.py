"""The locks of a data folder: which `up` runs on it, its address, and its users.

    up.lock    held exclusively by the folder's `up` while it runs
    up.users   held shared by each `generate` that uses it; a private `up` that can take it
               exclusively has no users left and exits
    up.json    the address, written by the holder of up.lock

The locks are the kernel's (flock), so they vanish with their process, however it ends.
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
"""How long to retry a claim, because a process that only checks the lock holds it for a moment."""

_NAMELESS_SECONDS = 30.0
"""How long to retry while the holder's address is unknown; a starting `up` announces it soon."""


@dataclass(frozen=True, slots=True)
class Record:
    """A running `up`: its process and address. A `private` one ends with its last user."""

    pid: int
    url: str
    private: bool


@contextmanager
def claimed(data: Path) -> Iterator[None]:
    """Hold the folder's `up` lock; raises AlreadyRunning if another process does."""
    descriptor = _open(data, "up.lock")
    try:
        began = time.monotonic()
        while not _try(descriptor, fcntl.LOCK_EX):
            limit = _COLLISION_SECONDS if _read(data) else _NAMELESS_SECONDS
            if time.monotonic() - began > limit:
                raise AlreadyRunning(_already_running(data))
            time.sleep(0.02)
        withdraw(data)
        try:
            yield
        finally:
            withdraw(data)
    finally:
        os.close(descriptor)


def _already_running(data: Path) -> str:
    record = _read(data)
    at = f" at {record.url} (process {record.pid})" if record else ""
    until = ", for as long as a `generate` uses it" if record and record.private else ""
    return f"imagemill is already running on {data}{at}{until}"


def announce(data: Path, record: Record) -> None:
    """Write the address for others to find. Only for the holder of `claimed`."""
    temporary = data / f"up.json.{os.getpid()}"
    temporary.write_text(json.dumps(asdict(record)))
    temporary.replace(data / "up.json")


def withdraw(data: Path) -> None:
    """Remove the address, because this `up` is ending and no new command should use it."""
    (data / "up.json").unlink(missing_ok=True)


def running(data: Path) -> Record | None:
    """The `up` that's running on the folder, if there is one and it has announced its address."""
    return _read(data) if is_held(data / "up.lock") else None


def _read(data: Path) -> Record | None:
    try:
        return Record(**json.loads((data / "up.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def is_held(lock: Path) -> bool:
    """Whether a process holds that lock file exclusively right now."""
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _try(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


class Users:
    """The users' lock of a folder, held until `leave` or the end of the process."""

    def __init__(self, data: Path) -> None:
        self._descriptor = _open(data, "up.users")

    def join(self) -> bool:
        """Become a user; False while a private `up` is ending, so try again."""
        return _try(self._descriptor, fcntl.LOCK_SH)

    def is_empty(self) -> bool:
        """Whether there are no users; if so, none can join until `leave`."""
        return _try(self._descriptor, fcntl.LOCK_EX)

    def leave(self) -> None:
        """Release the lock."""
        os.close(self._descriptor)


def is_used(data: Path) -> bool:
    """Whether the folder's private `up` has users; also False while it's ending.

    Another process that checks at the same instant counts as a user.
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
        raise StartFailed(f"can't use the data folder {data}: {error.strerror}") from error


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
