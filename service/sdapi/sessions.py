"""Who calls A1111's routes: the model that each caller chose, and who has just left.

A1111 has one state for everyone. Here a caller is an API key, or an address on a service without
keys, so that clients don't change each other's model or stop each other's images. Doesn't depend on
any route.
"""

import hashlib
import threading
import time
from pathlib import Path

from starlette.requests import Request

from jobs.errors import NotFound
from service.documents import Documents
from service.http.auth import Caller

INTERRUPT_SECONDS = 5.0
"""How long after its caller disconnected an image's own interrupt may arrive."""


def session_of(request: Request, caller: Caller) -> str:
    """A name for the caller: its key's id, or a digest of its address."""
    if caller.key is not None:
        return caller.key
    host = request.client.host if request.client else ""
    return hashlib.sha256(host.encode()).hexdigest()[:16]


class Sessions:
    """Callers' chosen models, kept under `root`, and their recent departures, per process."""

    def __init__(self, root: Path) -> None:
        self._choices = Documents(root, "choice_")
        self._departures: list[tuple[float, str]] = []
        self._lock = threading.Lock()

    def chosen(self, caller: Caller, session: str) -> str | None:
        """The model that the caller chose, if any; the catalog may have lost it since."""
        try:
            model: str = self._choices.get(caller.tenant, f"choice_{session}")["model"]
        except NotFound:
            return None
        return model

    def choose(self, caller: Caller, session: str, model: str) -> None:
        """Keep the caller's choice. Raises StorageUnavailable."""
        self._choices.put(caller.tenant, f"choice_{session}", {"model": model})

    def note_departure(self, session: str) -> None:
        """The caller has disconnected, so its image is being cancelled."""
        with self._lock:
            self._forget()
            self._departures.append((time.monotonic(), session))

    def take_departure(self, session: str) -> bool:
        """Whether an interrupt belongs to an image whose caller has just left.

        Clients that give up an image disconnect and send an interrupt, which must not stop the
        next image of the same caller. Each departure accounts for one interrupt.
        """
        with self._lock:
            self._forget()
            for place, (_, left) in enumerate(self._departures):
                if left == session:
                    del self._departures[place]
                    return True
            return False

    def _forget(self) -> None:
        oldest = time.monotonic() - INTERRUPT_SECONDS
        self._departures = [entry for entry in self._departures if entry[0] >= oldest]
