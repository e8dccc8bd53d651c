"""What workers say, as it was a moment ago: every request needs it, and must not ask for it anew.

Knows the store; for any thread.
"""

import threading
import time
from typing import Any

from jobs.queue.decode import WorkerInfo
from jobs.queue.store import Store

SECONDS = 0.25
"""How old the workers may be; they say something new twice a second at most."""

CARD_SECONDS = 1.0
"""How old a model's card may be; it changes when a worker has started."""


class RecentWorkers:
    """The store's workers, asked for at most once in SECONDS; meanwhile nobody waits for it."""

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
                self._seen |= {worker.info.get("model"): now for worker in self._known}
                self._until = now + SECONDS
            return self._known or []
        finally:
            self._asking.release()

    def absent_seconds(self, model: str) -> float:
        """How long ago a worker of the model was last seen, or this was made."""
        return time.monotonic() - self._seen.get(model, self._started)


class RecentCards:
    """The models' cards, each asked for at most once in CARD_SECONDS; a missing one every time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, tuple[float, dict[str, Any]]] = {}

    def of(self, model: str) -> dict[str, Any] | None:
        """What a worker published of the model, if one has. Raises StorageUnavailable."""
        until, card = self._known.get(model, (0.0, {}))
        if time.monotonic() < until:
            return card
        found = self._store.card(model)
        if found is not None:
            self._known[model] = (time.monotonic() + CARD_SECONDS, found)
        return found
