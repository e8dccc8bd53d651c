"""The workers as they were a moment ago: every poll tells an ETA, and must not ask for it anew.

Knows the store; for any thread.
"""

import threading
import time

from jobs.store import Store
from jobs.views import WorkerInfo

SECONDS = 0.25
"""How old an answer may be; workers say something new twice a second at most."""


class RecentWorkers:
    """The store's workers, asked for at most once in SECONDS."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._known: list[WorkerInfo] = []
        self._until = 0.0

    def all(self) -> list[WorkerInfo]:
        """The workers, by id. Raises StorageUnavailable."""
        with self._lock:
            if time.monotonic() >= self._until:
                self._known = self._store.workers()
                self._until = time.monotonic() + SECONDS
            return self._known
