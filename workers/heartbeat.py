"""Keeps the worker's leases alive, independently of the forward pass.

Every beat extends the leases of the images in flight and reports each one's step. The reply lists
lost leases and cancelled images, which are dropped. A beat also registers the worker's state, and
regularly sweeps the queue for other workers' expired leases. Nothing slow may run here: if a beat
comes too late, the worker loses all images it holds.
"""

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable

import structlog

from jobs.errors import StorageUnavailable
from jobs.queue.store import Store
from jobs.reports import WorkerReport
from workers.in_flight import InFlightImages
from workers.settings import WorkerSettings

log = structlog.get_logger(__name__)

BEATS_A_LEASE = 6
"""Beats per lease, so several may fail before the lease expires."""

SLOWEST_BEAT = 0.5
"""Most seconds between beats, so that people see the progress move."""

REGISTERED_SECONDS = 10.0
"""How long a worker counts as alive after its last beat."""

SWEEP_SECONDS = 2.0
"""Seconds between sweeps for expired leases."""


class Heartbeat:
    """Beats until `stop`.

    `describe` returns the report to register, and `stuck` whether to end the process. `rebalance`
    is called at every beat, to give images back if another worker is idle.
    """

    def __init__(
        self,
        *,
        name: str,
        store: Store,
        settings: WorkerSettings,
        flights: InFlightImages,
        describe: Callable[[], WorkerReport],
        stuck: Callable[[], bool],
        rebalance: Callable[[], None] = lambda: None,
    ) -> None:
        self._name, self._store = name, store
        self._settings, self._flights = settings, flights
        self._describe, self._stuck, self._rebalance = describe, stuck, rebalance
        self._stop = threading.Event()
        self._swept = 0.0

    def stop(self) -> None:
        """End `run` after the current beat."""
        self._stop.set()

    def run(self) -> None:
        """Beat until stopped; if the queue is unavailable, the next beat tries again."""
        interval = min(SLOWEST_BEAT, self._settings.lease_seconds / BEATS_A_LEASE)
        while not self._stop.wait(interval):
            if self._stuck():
                log.error("forward pass takes too long; ending this worker")
                os._exit(70)
            try:
                self._beat()
            except StorageUnavailable as error:
                log.warning("queue unavailable", reason=str(error))

    def _beat(self) -> None:
        flights = {flight.lease.key: flight for flight in self._flights.all()}
        leases = {(key, flight.lease.token): flight.step for key, flight in flights.items()}
        if leases:
            reply = self._store.beat(self._name, leases, self._settings.lease_seconds)
            held = set(self._flights.all())  # excludes images committed during the call
            for key in reply.lost | reply.cancelled:
                if flights[key] in held:
                    log.info("dropped", image=key, cancelled=key in reply.cancelled)
                    flights[key].drop()
            for key in reply.wished:
                flights[key].wished = True
        self._store.register(self._name, self._describe(), REGISTERED_SECONDS)
        self._rebalance()
        if time.monotonic() - self._swept >= SWEEP_SECONDS:
            self._swept = time.monotonic()
            self._store.sweep()


def worker_name(model: str, index: int) -> str:
    """A name that's unique for all time, because a restarted worker is a different worker.

    Host name and process id aren't enough: a restarted container may have the same ones.
    """
    host, process = socket.gethostname(), os.getpid()
    return f"{host}.{model}.{index}.{process}.{secrets.token_hex(4)}"
