"""Learns the costs of forward passes from real work.

Warm-up measures each bucket a few times, possibly on a busy machine, so the engine keeps measuring.
For each bucket of each size, `Learner` keeps the fastest of the latest passes, because noise only
makes passes slower. It forgets slowly, because a machine may become slower for good. The pinned
bucket never follows (`Costs.pinning`). A bucket that looked too slow is never chosen and so never
measured again, so the learner has one tried now and then. Doesn't use the queue or a model.
"""

import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from jobs.reports import Buckets
from workers.scheduler import BUCKETS, Costs

log = structlog.get_logger(__name__)

WINDOW = 64
"""Passes per window. The fastest of the current and the previous window counts."""

ENOUGH = 4
"""Passes of a bucket after which their fastest replaces the warm-up's figure."""

STALE = 2000
"""Passes of other buckets after which a bucket's cost is worth measuring again."""

TRY_EVERY = 32
"""At most one pass in this many tries a bucket above the knee."""

MOST_POINTS = 256
"""Most (size, bucket) pairs to learn, because clients may ask for any number of sizes."""

Measured = tuple[int, int, float]
"""Tokens of a sample, bucket, seconds of a forward pass."""


class Stopwatch:
    """Times a forward pass, starting when the stopwatch is created.

    With `on_cpu`, the time that this thread waited for a processor isn't counted. It is otherwise,
    because an accelerator keeps working while the thread waits.
    """

    def __init__(self, *, on_cpu: bool) -> None:
        # The delay is read inside the wall clock's interval, because a wait outside of it would be
        # subtracted without having been added, and make the pass look faster than it is.
        self._on_cpu = on_cpu
        self._began = time.perf_counter()
        self._delay = _run_delay() if on_cpu else 0.0

    def seconds(self) -> float:
        """Return the seconds since the start."""
        delay = _run_delay() - self._delay if self._on_cpu else 0.0
        return time.perf_counter() - self._began - delay


def _run_delay() -> float:
    """Seconds that this thread has waited for a processor; 0 if the system doesn't report them.

    /proc/thread-self/schedstat on Linux has nanoseconds running and waiting, and time slices.
    """
    try:
        with open("/proc/thread-self/schedstat", encoding="ascii") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


@dataclass(slots=True)
class _Point:
    """The fastest pass of the current window and the one before it."""

    # Two windows, so the minimum never rests on the few passes of a window that has just begun,
    # yet an old minimum is forgotten after at most twice WINDOW passes.

    now: float = float("inf")
    before: float = float("inf")
    count: int = 0
    seen: int = 0

    def take(self, seconds: float, at: int) -> None:
        if self.count and self.count % WINDOW == 0:
            self.before, self.now = self.now, float("inf")
        self.now = min(self.now, seconds)
        self.count += 1
        self.seen = at

    @property
    def seconds(self) -> float:
        return min(self.now, self.before)


class Learner:
    """The costs of one worker, updated with every pass; safe to call from any thread.

    `base` comes from warm-up, with costs learned by earlier workers as its `exact` ones.
    `usual_tokens` are those of a sample of the default size. `on_cpu` says whether forward passes
    compute on the thread that runs them. Without `learns`, the costs never change.
    """

    def __init__(
        self, base: Costs, usual_tokens: int, *, on_cpu: bool = False, learns: bool = True
    ) -> None:
        self.on_cpu = on_cpu
        self._usual_tokens, self._learns = usual_tokens, learns
        self._lock = threading.Lock()
        self._passes = 0
        self._tried = 0
        self._points: dict[tuple[int, int], _Point] = {}
        for key, seconds in base.exact.items():
            # Costs from an earlier run count as a full window that's already stale: good enough to
            # choose by, but the first real passes start a new window and replace them soon.
            self._points[key] = _Point(now=seconds, count=WINDOW, seen=-STALE)
        self._costs = replace(base, pinning=base.pinning or base.points)

    @property
    def costs(self) -> Costs:
        """The current costs."""
        return self._costs

    def observe(self, tokens: int, bucket: int, seconds: float) -> None:
        """Record that a forward pass of `bucket` samples of `tokens` each took `seconds`."""
        if not self._learns:
            return
        key = tokens, bucket
        with self._lock:
            self._passes += 1
            if key not in self._points and len(self._points) >= MOST_POINTS:
                return
            point = self._points.setdefault(key, _Point())
            point.take(seconds, self._passes)
            if point.count < ENOUGH or self._costs.exact.get(key) == point.seconds:
                return
            # A new object each time, so readers need no lock and never see a half-updated one.
            before, exact = self._costs, {**self._costs.exact, key: point.seconds}
            self._costs = after = replace(before, exact=exact)
        if (knee := after.largest(tokens)) != before.largest(tokens):
            log.info("costs: best batch size changed", tokens=tokens, bucket=knee)

    def trial(self, tokens: int, knee: int, most: int) -> int | None:
        """The bucket above the knee to try now, of at most `most` samples; usually None.

        Only buckets that warm-up has run, because a larger one might not fit in memory.
        """
        bucket = next((b for b in BUCKETS if b > knee), None)
        if (
            not self._learns
            or bucket is None
            or bucket > most
            or bucket * tokens > self._largest_measured
        ):
            return None
        with self._lock:
            point = self._points.get((tokens, bucket))
            is_known = point is not None and point.count >= ENOUGH
            is_fresh = point is not None and self._passes - point.seen < STALE
            if (is_known and is_fresh) or self._passes - self._tried < TRY_EVERY:
                return None
            self._tried = self._passes
            return bucket

    def measured(self) -> list[Measured]:
        """The costs of all buckets that ran often enough."""
        with self._lock:
            return [
                (tokens, bucket, point.seconds)
                for (tokens, bucket), point in sorted(self._points.items())
                if point.count >= ENOUGH
            ]

    def buckets(self) -> Buckets:
        """The buckets in use at the default size, for status pages."""
        costs, tokens = self._costs, self._usual_tokens
        return Buckets(pinned=costs.pinned(tokens), largest=costs.largest(tokens))

    @property
    def _largest_measured(self) -> int:
        return self._costs.points[-1][0] if self._costs.points else 0


class Keeper:
    """Writes a learner's costs next to the profile regularly, so a restart has them."""

    def __init__(self, learner: Learner, path: Path) -> None:
        self.learner, self._path = learner, path
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._written: list[Measured] = []

    def run(self, pause: float = 60.0) -> None:
        """Write every `pause` seconds until stopped."""
        while not self._stop.wait(pause):
            self.write()

    def stop(self) -> None:
        """End `run`, and write one last time."""
        self._stop.set()
        self.write()

    def write(self) -> None:
        """Write the costs if they changed; a failed write is logged and tried again later."""
        with self._lock:
            measured = self.learner.measured()
            if measured == self._written:
                return
            partial = self._path.with_name(f"{self._path.name}.{os.getpid()}")
            try:
                partial.write_text(json.dumps({"measured": measured}) + "\n")
                partial.replace(self._path)
            except OSError as error:
                log.warning("costs: can't write file", path=str(self._path), reason=str(error))
                with suppress(OSError):
                    partial.unlink(missing_ok=True)
                return
            self._written = measured


def read_learned(path: Path) -> dict[tuple[int, int], float]:
    """Exact costs written by a `Keeper`; empty if the file is missing or damaged."""
    try:
        described: Mapping[str, Sequence[Sequence[float]]] = json.loads(path.read_text())
        return {(int(t), int(b)): float(s) for t, b, s in described["measured"][:MOST_POINTS]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("costs: can't read file, starting over", path=str(path), reason=str(error))
        return {}
