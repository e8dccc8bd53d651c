"""Claims images and encodes their prompts, ahead of the denoising and on a thread of its own.

Holds at most `capacity` images, so that a worker never sits on work that another could do. An
image whose earlier worker died is run alone: nothing else is claimed until it has left. Knows the
store and the text encoders; nothing of steps, pixels or files.
"""

import queue
import threading
import uuid
from collections.abc import Callable

import structlog
import torch

from jobs.errors import PipelineError, StorageUnavailable
from jobs.job import Lease
from jobs.store import Store
from pipelines.seam import Pipeline
from workers.flights import Flight, Flights
from workers.settings import WorkerSettings

log = structlog.get_logger(__name__)

BELL_SECONDS = 1.0
"""How long one wait for the queue's bell lasts before the worker looks anyway."""


class Intake:
    """Feeds `ready` with flights whose prompts are encoded, while `stopping` is not set."""

    def __init__(
        self,
        *,
        model: str,
        name: str,
        store: Store,
        pipeline: Pipeline,
        settings: WorkerSettings,
        flights: Flights,
        capacity: Callable[[], int],
        give_up: Callable[[Flight, BaseException], None],
    ) -> None:
        self.ready: queue.SimpleQueue[Flight] = queue.SimpleQueue()
        self.stopping = threading.Event()
        self._model, self._name = model, name
        self._store, self._pipeline, self._settings = store, pipeline, settings
        self._flights, self._capacity, self._give_up = flights, capacity, give_up
        self._size: tuple[int, int] | None = None

    def run(self) -> None:
        """Claim and encode until told to stop; a queue that is away is waited for."""
        while not self.stopping.is_set():
            try:
                if not self._turn():
                    self._store.wait(self._model, BELL_SECONDS)
            except StorageUnavailable as error:
                log.warning("queue unavailable", reason=str(error))
                self.stopping.wait(BELL_SECONDS)

    def _turn(self) -> bool:
        """One claim and what follows from it; False when the queue had nothing."""
        capacity = self._capacity()
        if not self._flights.wait_below(capacity, BELL_SECONDS):
            return True
        leases = self._claim(capacity - len(self._flights))
        taken = [self._take(lease) for lease in leases]  # at once: from now on they are kept alive
        for flight in taken:
            if flight.lease.solo:
                self._run_alone(flight)
            else:
                self._encode(flight)
        return bool(leases)

    def _claim(self, limit: int) -> list[Lease]:
        """Claim at most `limit` images; a reply that got lost is asked for again by its nonce."""
        nonce = uuid.uuid4().hex
        while True:
            try:
                return self._store.claim(
                    self._model,
                    self._name,
                    limit=limit,
                    max_pixels=2**62,
                    lease_seconds=self._settings.lease_seconds,
                    prefer=self._size,
                    linger_seconds=self._settings.linger_seconds,
                    nonce=nonce,
                    held=self._flights.keys(),
                )
            except StorageUnavailable:
                if self.stopping.wait(BELL_SECONDS):
                    return []

    def _take(self, lease: Lease) -> Flight:
        flight = Flight(lease)
        self._flights.add(flight)
        self._size = (lease.request.width, lease.request.height)
        return flight

    def _run_alone(self, flight: Flight) -> None:
        """Hand over a solo image when all others have left, and wait until it has left too."""
        while not self._flights.wait_below(2, BELL_SECONDS):
            if self.stopping.is_set():
                return
        self._encode(flight)
        while not self._flights.wait_below(1, BELL_SECONDS) and not self.stopping.is_set():
            continue

    def _encode(self, flight: Flight) -> None:
        if flight.dropped or self.stopping.is_set():
            return
        try:
            [flight.conditioning] = self._pipeline.encode([flight.lease.request])
        except torch.AcceleratorError:
            raise
        except (PipelineError, RuntimeError, ValueError, TypeError) as error:
            self._give_up(flight, error)
            return
        self.ready.put(flight)
