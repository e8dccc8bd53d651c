"""Undelivered messages on disk, and the position up to which the event stream was read.

A message is written before the position, so after a crash in between it's created again with the
same id. No HTTP and no store here.
"""

import fcntl
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from jobs.errors import NotFound
from service.documents import Documents

_PENDING, _STATE, _CURSOR = "pending", "state", "msg_cursor"


@dataclass(frozen=True, slots=True)
class Message:
    """A message to a URL; `attempt` counts from 0, `due` is in seconds since the epoch.

    `job` and `event` say what it's about. `tenant`, `job` and `event` are "" in messages that were
    written by versions without them.
    """

    id: str
    url: str
    body: str
    created_at: float
    attempt: int
    due: float
    tenant: str = ""
    job: str = ""
    event: str = ""


class Outbox:
    """The messages under `root`; only one process at a time works on them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._documents = Documents(root, "msg_")
        self._lock: int | None = None

    def take(self) -> bool:
        """Become the process that works on these messages; False if another one is."""
        if self._lock is None:
            self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(self._root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                return False
            self._lock = lock
        return True

    def leave(self) -> None:
        """Let another process take over."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def put(self, message: Message) -> None:
        """Write or replace a message. Raises StorageUnavailable."""
        self._documents.put(_PENDING, message.id, asdict(message))

    def remove(self, message_id: str) -> None:
        """Remove a message, if it still exists."""
        try:
            self._documents.remove(_PENDING, message_id)
        except NotFound:
            return

    def pending(self) -> list[Message]:
        """All messages, oldest first."""
        return [Message(**document) for document in reversed(self._documents.all(_PENDING))]

    def cursor(self) -> str | None:
        """The id of the last event that was turned into messages."""
        try:
            return str(self._documents.get(_STATE, _CURSOR)["after"])
        except NotFound:
            return None

    def move_cursor(self, after: str) -> None:
        """Store the position up to which the stream was read. Raises StorageUnavailable."""
        self._documents.put(_STATE, _CURSOR, {"after": after, "at": time.time()})
