"""Keeps the leases alive and the queue informed, apart from the forward pass.

Every beat extends the leases of what is in flight and carries each sample's measured step; what
comes back (lost leases, cancellations) drops flights. It also sweeps the queue for other workers'
expired leases and registers what this worker is doing. Whatever may take long has no place here: a
beat that comes too late costs the worker all that it holds. Knows no model, no pixels and no files.
"""

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import structlog

from jobs.errors import StorageUnavailable
from jobs.queue.store import Store
from workers.in_flight import Flights
from workers.settings import WorkerSettings

log = structlog.get_logger(__name__)

BEATS_A_LEASE = 6
"""Beats in one lease's time: several may be lost before the lease is."""

SLOWEST_BEAT = 0.5
"""Seconds between beats at most, so that progress moves before a person's eyes."""

REGISTERED_SECONDS = 10.0
"""How long a worker counts as alive after its last beat."""

SWEEP_SECONDS = 2.0
"""Seconds between two looks for expired leases."""


class Heartbeat:
    """Beats until `stop`; `describe` returns what to register, `stuck` whether to give up.

    `share` is called at every beat, to look whether a neighbour could use what this worker holds.
    """

    def __init__(
        self,
        *,
        name: str,
        store: Store,
        settings: WorkerSettings,
        flights: Flights,
        describe: Callable[[], dict[str, Any]],
        stuck: Callable[[], bool],
        share: Callable[[], None] = lambda: None,
    ) -> None:
        self._name, self._store = name, store
        self._settings, self._flights = settings, flights
        self._describe, self._stuck, self._share = describe, stuck, share
        self._stop = threading.Event()
        self._swept = 0.0

    def stop(self) -> None:
        """End `run` after the beat in progress."""
        self._stop.set()

    def run(self) -> None:
        """Beat until stopped; a queue that is away is tried again at the next beat."""
        interval = min(SLOWEST_BEAT, self._settings.lease_seconds / BEATS_A_LEASE)
        while not self._stop.wait(interval):
            if self._stuck():
                log.error("a forward pass takes too long; giving this worker up")
                os._exit(70)
            try:
                self._beat()
            except StorageUnavailable as error:
                log.warning("queue unavailable", reason=str(error))

    def _beat(self) -> None:
        flights = {flight.lease.key: flight for flight in self._flights.all()}
        leases = {(key, flight.lease.token): flight.step for key, flight in flights.items()}
        if leases:
            answer = self._store.beat(self._name, leases, self._settings.lease_seconds)
            held = set(self._flights.all())  # without those that were committed meanwhile
            for key in answer.lost | answer.cancelled:
                if flights[key] in held:
                    log.info("dropped", image=key, cancelled=key in answer.cancelled)
                    flights[key].drop()
            for key in answer.wished:
                flights[key].wished = True
        self._store.register(self._name, self._describe(), REGISTERED_SECONDS)
        self._share()
        if time.monotonic() - self._swept >= SWEEP_SECONDS:
            self._swept = time.monotonic()
            self._store.sweep()


def worker_name(model: str, index: int) -> str:
    """A name that no other process has, ever: a restarted worker is another worker.

    The host's name and the process id do not see to that: a restarted container has both again.
    """
    host, process = socket.gethostname(), os.getpid()
    return f"{host}.{model}.{index}.{process}.{secrets.token_hex(4)}"
