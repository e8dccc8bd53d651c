"""A simulated device: how each policy serves a trace, in simulated seconds.

A forward pass takes exactly the time in `Costs`, and nothing else takes time. `ours` runs the real
scheduler (`workers.scheduler.choose`) over as many samples as a worker holds. `one_at_a_time` and
`whole_calls` are the servers that it's compared with. The simulation is deterministic, so tests can
check the order of service with it. A hundred thousand passes take seconds.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from bench.search import highest
from workers.scheduler import (
    BUCKETS,
    GOOD_TIME,
    NOT_PASSED,
    Candidate,
    Costs,
    Passed,
    choose,
    overtaken,
)

TOKENS = 64
"""Image tokens of every simulated sample."""

BATCHES_PAY = Costs(tuple((TOKENS * b, 0.04 + 0.006 * (b - 1)) for b in BUCKETS))
"""A device that a lone sample leaves mostly idle: 32 at once give 5.7 times the rate."""

NO_BATCH_PAYS = Costs(tuple((TOKENS * b, 0.0384 * b + 0.0016) for b in BUCKETS))
"""A device that one sample fills: 32 at once give a 4 % higher rate."""


@dataclass(frozen=True, slots=True)
class Request:
    """A requested image: arrival in seconds from the start, steps and class."""

    at: float
    steps: int
    reproducible: bool = False


@dataclass(frozen=True, slots=True)
class Served:
    """A request and its end, in seconds from the start."""

    request: Request
    done: float

    def over_solo(self, costs: Costs) -> float:
        """The latency divided by the solo time."""
        solo = self.request.steps * costs.seconds(TOKENS)
        return (self.done - self.request.at) / solo


class Load:
    """Requests over time: some arrive at fixed times, others when an earlier one is done."""

    def __init__(
        self, requests: Sequence[Request], then: Callable[[Served], Request | None] | None = None
    ) -> None:
        self._coming = [(request.at, place, request) for place, request in enumerate(requests)]
        heapify(self._coming)
        self._count, self._then = len(requests), then
        self.served: list[Served] = []

    @property
    def next_at(self) -> float | None:
        """When the next request arrives; None if there are no more."""
        return self._coming[0][0] if self._coming else None

    def due(self, now: float) -> list[Request]:
        """Requests that have arrived and weren't returned before, in order of arrival."""
        requests = []
        while self._coming and self._coming[0][0] <= now:
            requests.append(heappop(self._coming)[2])
        return requests

    def add(self, request: Request) -> None:
        """Add a request."""
        heappush(self._coming, (request.at, self._count, request))
        self._count += 1

    def finish(self, request: Request, now: float) -> None:
        """Mark a request as done; its caller may then ask for another."""
        self.served.append(Served(request, now))
        if self._then and (following := self._then(self.served[-1])):
            self.add(following)


def poisson(
    load: float,
    costs: Costs,
    seed: int,
    steps: Sequence[int],
    *,
    solos: float = 60.0,
    reproducible: bool = False,
) -> Load:
    """Poisson arrivals over the time that `solos` requests take alone, with uniformly drawn steps.

    A `load` of 1 is the arrival rate that one-at-a-time serving can just keep up with.
    """
    draw, kinds = random.Random(seed), random.Random(seed)
    mean = sum(steps) / len(steps) * costs.seconds(TOKENS)
    at, requests = 0.0, []
    for _ in range(max(20, round(load * solos))):
        at += draw.expovariate(load / mean)
        requests.append(Request(at, kinds.choice(list(steps)), reproducible))
    return Load(requests)


def closed(callers: int, total: int, steps: Sequence[int], *, reproducible: bool = False) -> Load:
    """`total` requests of callers who each ask again as soon as they have their image."""
    left = iter(range(total - callers))

    def again(served: Served) -> Request | None:
        number = next(left, None)
        if number is None:
            return None
        kind = steps[(number + callers) % len(steps)]
        return Request(served.done, kind, reproducible)

    first = [Request(0.0, steps[n % len(steps)], reproducible) for n in range(callers)]
    return Load(first, again)


Policy = Callable[[Load, Costs], Sequence[Served]]
"""Serves a load; returns its requests in the order in which they finished."""


def ours(load: Load, costs: Costs) -> Sequence[Served]:
    """Step-level batching by `choose`, over as many samples as a full worker takes in."""
    now, waiting, held = 0.0, list[Request](), dict[str, _Held]()
    room, count = 2 * costs.held(TOKENS), 0
    while waiting or held or load.next_at is not None:
        if not waiting and not held:
            now = max(now, load.next_at or 0.0)
        waiting += load.due(now)
        while waiting and len(held) < room:
            key = f"{count:06}"
            held[key] = _Held(waiting.pop(0), key, now)
            count += 1
        now += _step(held, now, costs)
        for sample in [s for s in held.values() if s.step == s.request.steps]:
            del held[sample.key]
            load.finish(sample.request, now)
    return load.served


def _step(held: Mapping[str, "_Held"], now: float, costs: Costs) -> float:
    """Run one forward pass over what `choose` picks; return its seconds."""
    candidates = [sample.candidate(now) for sample in held.values()]
    forward = choose(candidates, costs, {})
    assert forward is not None
    seconds = costs.seconds(forward.bucket * TOKENS)
    members = [c for c in candidates if c.key in forward.keys]
    for candidate in candidates:
        sample = held[candidate.key]
        if candidate.key in forward.keys:
            sample.step += 1
            sample.ran += seconds
        else:
            sample.passed = sample.passed.plus(overtaken(candidate, members), seconds)
    return seconds


def one_at_a_time(load: Load, costs: Costs) -> Sequence[Served]:
    """Each request alone, in order of arrival."""
    return _calls(load, costs, 1)


def whole_calls(load: Load, costs: Costs) -> Sequence[Served]:
    """The oldest request with all waiting ones of equal steps, up to the largest useful bucket."""
    return _calls(load, costs, costs.largest(TOKENS))


def _calls(load: Load, costs: Costs, most: int) -> Sequence[Served]:
    now, waiting = 0.0, list[Request]()
    while waiting or load.next_at is not None:
        if not waiting:
            now = max(now, load.next_at or 0.0)
        waiting += load.due(now)
        batch = [r for r in waiting if r.steps == waiting[0].steps][:most]
        waiting = [r for r in waiting if not any(r is member for member in batch)]
        bucket = max(b for b in BUCKETS if b <= len(batch))
        now += batch[0].steps * costs.seconds(bucket * TOKENS)
        for request in batch:
            load.finish(request, now)
    return load.served


@dataclass(slots=True, eq=False)
class _Held:
    """A sample that the worker holds."""

    request: Request
    key: str
    ready: float
    step: int = 0
    ran: float = 0.0
    passed: Passed = NOT_PASSED

    def candidate(self, now: float) -> Candidate:
        return Candidate(
            key=self.key,
            job=self.key,
            priority=5,
            group=0,
            tokens=TOKENS,
            steps=self.request.steps,
            remaining=self.request.steps - self.step,
            age=now - self.request.at,
            waited=now - self.ready - self.ran,
            passed=self.passed,
            reproducible=self.request.reproducible,
        )


def goodput_of(
    policy: Policy, costs: Costs, seed: int, steps: Sequence[int], reproducible: bool
) -> float:
    """The load, to 2 %, at which 90 % of a Poisson trace finish within four solo times."""

    def carried(load: float) -> bool:
        trace = poisson(load, costs, seed, steps, reproducible=reproducible)
        served = policy(trace, costs)
        in_time = sum(result.over_solo(costs) <= GOOD_TIME for result in served)
        return in_time >= 0.9 * len(served)

    return highest(carried, 0.36, 0.05, precision=1.02, stride=1.2)
