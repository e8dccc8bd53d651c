"""Claims images and encodes their prompts, on a thread of its own and ahead of denoising.

Holds at most `capacity` images, so a worker never holds back work that another could do. A full
worker still admits a few images of jobs it holds none of. An image whose earlier worker died runs
alone: nothing else is claimed until it's finished. With a phased pipeline, images are claimed only
while the encoding phase is open. When stopped, it gives back everything that hasn't reached the
engine.
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
from workers.in_flight import InFlight, InFlightImages
from workers.phases import Phase, Phases
from workers.settings import WorkerSettings

log = structlog.get_logger(__name__)

BELL_SECONDS = 1.0
"""How long to wait for the queue's bell before checking the queue anyway."""

JOIN_SECONDS = 0.2
"""How often a full worker checks for jobs that it holds none of."""

JOINING = 4
"""A full worker admits its capacity divided by this at once, and its capacity again in all."""


class Intake:
    """Puts images with encoded prompts into `ready` until `stopping` is set.

    `is_starved` is set if the last claim got fewer images than it asked for.
    """

    def __init__(
        self,
        *,
        model: str,
        name: str,
        store: Store,
        pipeline: Pipeline,
        settings: WorkerSettings,
        flights: InFlightImages,
        capacity: Callable[[], int],
        give_up: Callable[[InFlight, BaseException], None],
        give_back: Callable[[InFlight], None],
        phases: Phases,
    ) -> None:
        self.ready: queue.SimpleQueue[InFlight] = queue.SimpleQueue()
        self.stopping = threading.Event()
        self.is_starved = False
        self._rested = 0.0
        self._model, self._name = model, name
        self._store, self._pipeline, self._settings = store, pipeline, settings
        self._flights, self._capacity = flights, capacity
        self._give_up, self._give_back, self._phases = give_up, give_back, phases
        self._size: tuple[int, int] | None = None
        self._solo: InFlight | None = None

    @property
    def rests(self) -> bool:
        """Whether the pause of `rest` is still on."""
        return time.monotonic() < self._rested

    def rest(self, seconds: float) -> None:
        """Claim nothing for `seconds`."""
        self._rested = time.monotonic() + seconds

    def run(self) -> None:
        """Claim and encode until stopped; waits if the queue is unavailable."""
        while not self.stopping.is_set():
            try:
                turn = self._round if self._phases.phased else self._turn
                if not turn():
                    self._store.wait(self._model, BELL_SECONDS)
            except StorageUnavailable as error:
                log.warning("queue unavailable", reason=str(error))
                self.stopping.wait(BELL_SECONDS)
        self._give_back_rest()

    def _give_back_rest(self) -> None:
        """Give back the images that the engine hasn't taken, and a solo one that's waiting."""
        if self._solo is not None:
            self._give_back(self._solo)
        with suppress(queue.Empty):
            while True:
                self._give_back(self.ready.get_nowait())

    def _turn(self) -> bool:
        """Claim images and encode their prompts; False if the queue had none."""
        if self.rests:
            self.stopping.wait(max(0.0, self._rested - time.monotonic()))
        capacity = self._capacity()
        if self._flights.wait_below(capacity, JOIN_SECONDS):
            room = capacity - len(self._flights)
            leases = self._claim(room)
            self.is_starved = len(leases) < room
        elif not (leases := self._join(capacity)):
            return True
        # Add all before encoding any, because the heartbeat only extends leases of added images.
        for flight in [self._take(lease) for lease in leases]:
            if flight.lease.solo:
                self._run_alone(flight)
            else:
                self._encode(flight)
        return bool(leases)

    def _join(self, capacity: int) -> list[Lease]:
        """Claim a little although the worker is full, so a long job doesn't hold up others."""
        room = min(max(1, capacity // JOINING), 2 * capacity - len(self._flights))
        priority = max((f.lease.priority for f in self._flights.all()), default=0)
        return self._claim(room, priority) if room > 0 else []

    def _round(self) -> bool:
        """Like `_turn` for a phased pipeline: claim and encode until the queue is empty."""
        if not self._phases.wait(Phase.ENCODE, BELL_SECONDS):
            return True
        has_claimed = False
        while not self.stopping.is_set() and (flights := self._more()):
            has_claimed = True
            for flight in flights:
                self._encode(flight)
            if flights[0].lease.solo:
                break
        if self.ready.empty():
            return has_claimed
        self._phases.end(Phase.ENCODE)
        return True

    def _more(self) -> list[InFlight]:
        """Claim images for this round; a solo image waits for a round of its own."""
        if self._solo is None:
            room = self._capacity() - len(self._flights)
            flights = [self._take(lease) for lease in self._claim(room)] if room > 0 else []
            if not flights or not flights[0].lease.solo:
                return flights
            [self._solo] = flights
        if not self.ready.empty():
            return []
        solo, self._solo = self._solo, None
        return [solo]

    def _claim(self, limit: int, joins_from: int | None = None) -> list[Lease]:
        """Claim at most `limit` images; after a lost reply, the nonce gets the same ones again."""
        nonce, asked = uuid.uuid4().hex, time.monotonic()
        while not self.stopping.is_set():
            try:
                leases = self._store.claim(
                    self._model,
                    self._name,
                    limit=limit,
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
                seconds = time.monotonic() - asked
                for lease in leases:
                    tracing.record(lease.trace, "claim", seconds, image=lease.key)
                return leases
        return []

    def _take(self, lease: Lease) -> InFlight:
        flight = InFlight(lease)
        self._flights.add(flight)
        self._size = (lease.request.width, lease.request.height)
        return flight

    def _run_alone(self, flight: InFlight) -> None:
        """Start a solo image once all others have finished, and wait until it has too."""
        while not self._flights.wait_below(2, BELL_SECONDS):
            if self.stopping.is_set():
                break
        self._encode(flight)
        while not self._flights.wait_below(1, BELL_SECONDS) and not self.stopping.is_set():
            continue

    def _encode(self, flight: InFlight) -> None:
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
