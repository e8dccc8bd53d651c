"""What forward passes cost, learned from those that real work runs.

Warm-up measures each bucket a few times, perhaps on a busy machine. So the engine keeps measuring:
for each bucket of each size, `Learner` keeps the fastest of the latest passes, since noise only
adds, and forgets slowly, since a machine may become slower for good. The pinned bucket never
follows (`Costs.pinning`). A bucket that looked too slow is never chosen and so never measured
again; therefore the learner has one tried now and then. Knows no queue and no model.
"""

import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from workers.scheduler import BUCKETS, Costs

log = structlog.get_logger(__name__)

WINDOW = 64
"""Passes after which the fastest is looked for anew; the window before still counts."""

ENOUGH = 4
"""Passes of a bucket from which on their fastest replaces what warm-up measured."""

STALE = 2000
"""Passes of other buckets after which a bucket's cost is worth another look."""

TRY_EVERY = 32
"""At most one pass in this many tries a bucket above the knee."""

MOST_POINTS = 256
"""Buckets of sizes that are kept; where any size may be asked for, later ones go unlearned."""

Measured = tuple[int, int, float]
"""Tokens of a sample, bucket, seconds of a forward pass."""


class Stopwatch:
    """Times a forward pass, started when it's made.

    Where the calling thread computes it on the CPU, the time is left out that the thread was ready
    to run while other programs had the processor. An accelerator works on during such a time.
    """

    def __init__(self, *, on_cpu: bool) -> None:
        # The interval between the two delays lies within that of the wall clock, because a wait
        # outside the latter would make the pass look faster than it is.
        self._on_cpu = on_cpu
        self._began = time.perf_counter()
        self._delay = _run_delay() if on_cpu else 0.0

    def seconds(self) -> float:
        """Seconds since the start."""
        delay = _run_delay() - self._delay if self._on_cpu else 0.0
        return time.perf_counter() - self._began - delay


def _run_delay() -> float:
    """Seconds that this thread has waited for a processor; 0 where the system doesn't count them.

    Linux counts them in /proc/thread-self/schedstat: computing, waiting (both ns), time slices.
    """
    try:
        with open("/proc/thread-self/schedstat", encoding="ascii") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


@dataclass(slots=True)
class _Point:
    """The fastest of the passes in this window and in the one before it."""

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
    """The costs of one worker as they become known; every method may be called from any thread.

    `base` is what warm-up measured, with what earlier workers learned as its exact costs, and
    `usual_tokens` are those of a sample of the default size. `on_cpu` tells that forward passes
    compute on the thread that runs them. Without `learns` the costs stay as they are.
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
            self._points[key] = _Point(now=seconds, count=WINDOW, seen=-STALE)
        self._costs = Costs(base.points, dict(base.exact), base.pinning or base.points)

    @property
    def costs(self) -> Costs:
        """What is known now."""
        return self._costs

    def observe(self, tokens: int, bucket: int, seconds: float) -> None:
        """A forward pass of a bucket of samples of `tokens` each took this long."""
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
            before, exact = self._costs, {**self._costs.exact, key: point.seconds}
            self._costs = after = Costs(before.points, exact, before.pinning)
        if (knee := after.largest(tokens)) != before.largest(tokens):
            log.info("costs: another batch size pays most", tokens=tokens, bucket=knee)

    def trial(self, tokens: int, knee: int, most: int) -> int | None:
        """The bucket above the knee to fill for once, of at most `most` samples; mostly None.

        Only buckets that warm-up has run: a larger one might not fit the device's memory.
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
        """All that is known of buckets that ran often enough."""
        with self._lock:
            return [
                (tokens, bucket, point.seconds)
                for (tokens, bucket), point in sorted(self._points.items())
                if point.count >= ENOUGH
            ]

    def describe(self) -> dict[str, int]:
        """The buckets in use at the default size, for people."""
        costs, tokens = self._costs, self._usual_tokens
        return {"pinned": costs.pinned(tokens), "largest": costs.largest(tokens)}

    @property
    def _largest_measured(self) -> int:
        return self._costs.points[-1][0] if self._costs.points else 0


class Keeper:
    """Writes what a learner knows next to the profile now and then, so that a restart has it."""

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
        """End `run`, and write for the last time."""
        self._stop.set()
        self.write()

    def write(self) -> None:
        """Write it now, unless nothing changed; a disk that refuses costs nothing but this."""
        with self._lock:
            measured = self.learner.measured()
            if measured == self._written:
                return
            partial = self._path.with_name(f"{self._path.name}.{os.getpid()}")
            try:
                partial.write_text(json.dumps({"measured": measured}) + "\n")
                partial.replace(self._path)
            except OSError as error:
                log.warning("costs: can't be kept", path=str(self._path), reason=str(error))
                with suppress(OSError):
                    partial.unlink(missing_ok=True)
                return
            self._written = measured


def read_learned(path: Path) -> dict[tuple[int, int], float]:
    """Exact costs that a keeper wrote; nothing where there is no such file or it's damaged."""
    try:
        described: Mapping[str, Sequence[Sequence[float]]] = json.loads(path.read_text())
        return {(int(t), int(b)): float(s) for t, b, s in described["measured"][:MOST_POINTS]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("costs: unreadable, learned anew", path=str(path), reason=str(error))
        return {}
