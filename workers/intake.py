"""Claims images and encodes their prompts, ahead of the denoising and on a thread of its own.

Holds at most `capacity` images, so that a worker never sits on work that another could do; beside
those it lets in some of a job of which it holds nothing. An image whose earlier worker died is run
alone: nothing else is claimed until it has left. Where the pipeline's stages take turns, it claims
only while it may encode. When told to stop it gives back whatever has not reached the engine. Knows
the store and the text encoders; nothing of steps, pixels or files.
"""

import queue
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress

import structlog
import torch

from jobs.errors import StorageUnavailable
from jobs.job import Lease
from jobs.queue.store import Store
from jobs.runtime import tracing
from pipelines.seam import Pipeline
from workers.in_flight import Flight, Flights
from workers.phases import Phase, Phases
from workers.settings import WorkerSettings

log = structlog.get_logger(__name__)

BELL_SECONDS = 1.0
"""How long one wait for the queue's bell lasts before the worker looks anyway."""

JOIN_SECONDS = 0.2
"""How often a full worker looks whether a job has come of which it holds nothing."""

JOINING = 4
"""A full worker lets in this part of its capacity at once, and as much as its capacity in all."""


class Intake:
    """Feeds `ready` with flights whose prompts are encoded, while `stopping` is not set.

    `is_starved` tells that the queue had less than was asked for.
    """

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
        give_back: Callable[[Flight], None],
        phases: Phases,
    ) -> None:
        self.ready: queue.SimpleQueue[Flight] = queue.SimpleQueue()
        self.stopping = threading.Event()
        self.is_starved = False
        self._rested = 0.0
        self._model, self._name = model, name
        self._store, self._pipeline, self._settings = store, pipeline, settings
        self._flights, self._capacity = flights, capacity
        self._give_up, self._give_back, self._phases = give_up, give_back, phases
        self._size: tuple[int, int] | None = None
        self._solo: Flight | None = None

    @property
    def rests(self) -> bool:
        """Whether `rest` is not over yet."""
        return time.monotonic() < self._rested

    def rest(self, seconds: float) -> None:
        """Claim nothing for so long."""
        self._rested = time.monotonic() + seconds

    def run(self) -> None:
        """Claim and encode until told to stop; a queue that is away is waited for."""
        while not self.stopping.is_set():
            try:
                turn = self._round if self._phases.phased else self._turn
                if not turn():
                    self._store.wait(self._model, BELL_SECONDS)
            except StorageUnavailable as error:
                log.warning("queue unavailable", reason=str(error))
                self.stopping.wait(BELL_SECONDS)
        self._leave_rest()

    def _leave_rest(self) -> None:
        """Give back what is encoded and the engine has not taken, and the one that waits alone."""
        if self._solo is not None:
            self._give_back(self._solo)
        with suppress(queue.Empty):
            while True:
                self._give_back(self.ready.get_nowait())

    def _turn(self) -> bool:
        """One claim and what follows from it; False when the queue had nothing."""
        if self.rests:
            self.stopping.wait(max(0.0, self._rested - time.monotonic()))
        capacity = self._capacity()
        if self._flights.wait_below(capacity, JOIN_SECONDS):
            wanted = capacity - len(self._flights)
            leases = self._claim(wanted)
            self.is_starved = len(leases) < wanted
        elif not (leases := self._join(capacity)):
            return True
        taken = [self._take(lease) for lease in leases]  # at once: from now on they are kept alive
        for flight in taken:
            if flight.lease.solo:
                self._run_alone(flight)
            else:
                self._encode(flight)
        return bool(leases)

    def _join(self, capacity: int) -> list[Lease]:
        """What a full worker lets in: so a long job in its hands keeps nobody else's waiting."""
        room = min(max(1, capacity // JOINING), 2 * capacity - len(self._flights))
        priority = max((f.lease.priority for f in self._flights.all()), default=0)
        return self._claim(room, priority) if room > 0 else []

    def _round(self) -> bool:
        """A phased pipeline's round: claim and encode until the queue has no more; as `_turn`."""
        if not self._phases.wait(Phase.ENCODE, BELL_SECONDS):
            return True
        found = False
        while not self.stopping.is_set() and (taken := self._more()):
            found = True
            for flight in taken:
                self._encode(flight)
            if taken[0].lease.solo:
                break
        if self.ready.empty():
            return found
        self._phases.end(Phase.ENCODE)
        return True

    def _more(self) -> list[Flight]:
        """What joins this round. A solo image waits for one of its own."""
        if self._solo is None:
            room = self._capacity() - len(self._flights)
            taken = [self._take(lease) for lease in self._claim(room)] if room > 0 else []
            if not taken or not taken[0].lease.solo:
                return taken
            [self._solo] = taken
        if not self.ready.empty():
            return []
        waiting, self._solo = self._solo, None
        return [waiting]

    def _claim(self, limit: int, joins_from: int | None = None) -> list[Lease]:
        """Claim at most `limit` images; a reply that got lost is asked for again by its nonce."""
        nonce, asked = uuid.uuid4().hex, time.monotonic()
        while not self.stopping.is_set():
            try:
                leases = self._store.claim(
                    self._model,
                    self._name,
                    limit=limit,
                    max_pixels=2**62,
                    lease_seconds=self._settings.lease_seconds,
                    prefer=self._size,
                    linger_seconds=self._settings.linger_seconds,
                    nonce=nonce,
                    held=self._flights.keys(),
                    joins_from=joins_from,
                )
            except StorageUnavailable:
                self.stopping.wait(BELL_SECONDS)
            else:
                for one in leases:
                    tracing.record(one.trace, "claim", time.monotonic() - asked, image=one.key)
                return leases
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
                break
        self._encode(flight)
        while not self._flights.wait_below(1, BELL_SECONDS) and not self.stopping.is_set():
            continue

    def _encode(self, flight: Flight) -> None:
        if flight.dropped:
            self._flights.remove(flight)
            return
        if self.stopping.is_set():
            self._give_back(flight)
            return
        try:
            with tracing.under(flight.lease.trace, "encode", image=flight.lease.key):
                [flight.conditioning] = self._pipeline.encode([flight.lease.request])
        except torch.AcceleratorError:
            raise
        except Exception as error:
            self._give_up(flight, error)
            return
        self.ready.put(flight)
