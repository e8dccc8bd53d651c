"""What this worker has claimed and not yet finished: shared by its four threads.

A `Flight` goes intake -> engine -> delivery and then leaves; the heartbeat reads its step and
tells it when its lease was lost or its image cancelled. Knows no Redis and no model.
"""

import threading
import time
from dataclasses import dataclass, field

from jobs.job import Lease
from pipelines.seam import Conditioning, Sample
from workers.scheduler import NOT_PASSED, Passed


@dataclass(slots=True, eq=False)
class Flight:
    """One claimed image on its way. Times are of the monotonic clock, in seconds.

    `dropped` is set when the lease was lost or the image cancelled: whoever holds the flight next
    lets go of it. `ready` is when its prompt was encoded, `ran` the time since then in forward
    passes, and `passed` the time that newer samples took while it waited. `bucket` is the size of
    the forward batch that it last ran in. `wished` is set when somebody wants to see a preview.
    """

    lease: Lease
    claimed: float = field(default_factory=time.monotonic)
    ready: float = field(default_factory=time.monotonic)
    conditioning: Conditioning | None = None
    sample: Sample | None = None
    dropped: bool = False
    ran: float = 0.0
    passed: Passed = NOT_PASSED
    bucket: int = 0
    wished: bool = False

    @property
    def step(self) -> int:
        """Finished steps of those that the caller asked for.

        Some schedulers take more forward passes than that (PNDM one, Heun twice as many).
        """
        if self.sample is None:
            return 0
        return self.sample.step * self.sample.request.steps // self.sample.steps

    def drop(self) -> None:
        """Let whoever holds this flight abandon it at the next step boundary."""
        self.dropped = True
        if self.sample:
            self.sample.cancelled = True


class Flights:
    """The flights of one worker by key; every method may be called from any thread."""

    def __init__(self) -> None:
        self._by_key: dict[str, Flight] = {}
        self._changed = threading.Condition()

    def __len__(self) -> int:
        with self._changed:
            return len(self._by_key)

    def add(self, flight: Flight) -> None:
        """Take in a claimed image."""
        with self._changed:
            self._by_key[flight.lease.key] = flight

    def remove(self, flight: Flight) -> None:
        """Forget a flight that is finished or abandoned; a second call does nothing."""
        with self._changed:
            if self._by_key.get(flight.lease.key) is flight:
                del self._by_key[flight.lease.key]
            self._changed.notify_all()

    def all(self) -> list[Flight]:
        """A snapshot, in the order of claiming."""
        with self._changed:
            return list(self._by_key.values())

    def pixel_steps(self) -> int:
        """Pixel-steps that are still to do, for the ETA."""
        return sum(
            max(0, flight.lease.request.steps - flight.step) * flight.lease.request.pixels
            for flight in self.all()
        )

    def keys(self) -> list[str]:
        """The keys `job:index` of a snapshot."""
        with self._changed:
            return list(self._by_key)

    def wait_below(self, count: int, seconds: float) -> bool:
        """Wait until fewer than `count` flights are left, at most `seconds`; whether so."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._by_key) < count, seconds)
