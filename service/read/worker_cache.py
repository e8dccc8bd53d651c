"""A short-lived cache of the workers' reports, because every request needs them.

Reads the store. Thread-safe.
"""

import threading
import time

from jobs.queue.decode import WorkerInfo
from jobs.queue.store import Store
from jobs.reports import ModelCard

SECONDS = 0.25
"""Maximum age of the workers' reports; workers report at most twice per second."""

CARD_SECONDS = 1.0
"""Maximum age of a model's card; it only changes when a worker starts."""


class RecentWorkers:
    """The store's workers, read at most once per SECONDS; other threads don't wait for the read."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._asking = threading.Lock()
        self._known: list[WorkerInfo] | None = None
        self._until = 0.0
        self._started = time.monotonic()
        self._seen: dict[object, float] = {}

    def all(self) -> list[WorkerInfo]:
        """The workers, by id. Raises StorageUnavailable."""
        known, waits = self._known, self._known is None
        if known is not None and time.monotonic() < self._until:
            return known
        if not self._asking.acquire(blocking=waits):
            return known or []
        try:
            if not waits or self._known is None:
                self._known = self._store.workers()
                now = time.monotonic()
                self._seen |= {worker.report.model: now for worker in self._known}
                self._until = now + SECONDS
            return self._known or []
        finally:
            self._asking.release()

    def absent_seconds(self, model: str) -> float:
        """How long ago a worker of the model was last seen, or else this cache was created."""
        return time.monotonic() - self._seen.get(model, self._started)


class RecentCards:
    """The models' cards, each read at most once per CARD_SECONDS; a missing card isn't cached."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, tuple[float, ModelCard]] = {}

    def of(self, model: str) -> ModelCard | None:
        """The card that a worker published for the model, if any. Raises StorageUnavailable."""
        known = self._known.get(model)
        if known is not None and time.monotonic() < known[0]:
            return known[1]
        latest = self._store.card(model)
        if latest is not None:
            self._known[model] = (time.monotonic() + CARD_SECONDS, latest)
        return latest
