"""The images that this worker has claimed and not finished yet, shared by its four threads.

An `InFlight` image goes from intake to engine to delivery. The heartbeat reads its step, and drops
it if its lease was lost or the image cancelled. Doesn't use Redis or a model.
"""

import threading
import time
from dataclasses import dataclass, field

from jobs.job import Lease
from pipelines.seam import Conditioning, Sample
from workers.scheduler import NOT_PASSED, Passed


@dataclass(slots=True, eq=False)
class InFlight:
    """A claimed image. Times are seconds of the monotonic clock.

    `dropped` is set when the lease was lost or the image cancelled; the next thread that handles it
    then discards it. `ready` is when its prompt was encoded, `ran` the seconds it has spent in
    forward passes since, and `passed` the time that newer samples took while it waited. `bucket` is
    the size of the last forward batch it ran in. `wished` is set when a client wants a preview.
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
        """Finished steps, out of the number in the request.

        Some schedulers run more forward passes than that (PNDM one more, Heun twice as many).
        """
        if self.sample is None:
            return 0
        return self.sample.step * self.sample.request.steps // self.sample.steps

    def drop(self) -> None:
        """Have the thread that handles this image discard it at the next step boundary."""
        self.dropped = True
        if self.sample:
            self.sample.cancelled = True


class InFlightImages:
    """One worker's images in flight, by key; safe to call from any thread."""

    def __init__(self) -> None:
        self._by_key: dict[str, InFlight] = {}
        self._changed = threading.Condition()

    def __len__(self) -> int:
        with self._changed:
            return len(self._by_key)

    def add(self, flight: InFlight) -> None:
        """Add a claimed image."""
        with self._changed:
            self._by_key[flight.lease.key] = flight

    def remove(self, flight: InFlight) -> None:
        """Remove an image that's finished or discarded; calling it twice is fine."""
        with self._changed:
            if self._by_key.get(flight.lease.key) is flight:
                del self._by_key[flight.lease.key]
            self._changed.notify_all()

    def all(self) -> list[InFlight]:
        """A snapshot, in the order they were claimed."""
        with self._changed:
            return list(self._by_key.values())

    def pixel_steps(self) -> int:
        """Remaining pixel-steps, for the ETA."""
        return sum(
            max(0, flight.lease.request.steps - flight.step) * flight.lease.request.pixels
            for flight in self.all()
        )

    def keys(self) -> list[str]:
        """A snapshot of the keys (`job:index`)."""
        with self._changed:
            return list(self._by_key)

    def wait_below(self, count: int, seconds: float) -> bool:
        """Wait up to `seconds` until fewer than `count` images are left; False on timeout."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._by_key) < count, seconds)
