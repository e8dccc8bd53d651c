"""Three ways to serve one trace of arrivals with one model: what the benchmarks compare.

`stepwise` is our engine. `one_at_a_time` runs each request alone in order of arrival, as a plain
server does. `whole_calls` batches waiting requests that have equal steps, and runs each batch from
start to end before it looks again. All run the same forward passes of the same pipeline.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jobs.job import Lease
from jobs.request import ImageRequest
from pipelines.seam import Pipeline, Sample
from workers.engine import Engine
from workers.flights import Flight, Flights
from workers.scheduler import BUCKETS, Costs


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request and when it comes, in seconds from the start."""

    at: float
    request: ImageRequest


Policy = Callable[[Pipeline, Costs, Sequence[Arrival]], list[float]]
"""Serves the arrivals; the seconds from each one's arrival to its decoded pixels, in order."""


def stepwise(pipeline: Pipeline, costs: Costs, arrivals: Sequence[Arrival]) -> list[float]:
    """Our engine: step-level batching, least remaining work first; decoding on its own thread."""
    flights, finished = Flights(), [0.0] * len(arrivals)
    ready: queue.SimpleQueue[Flight] = queue.SimpleQueue()
    done: queue.SimpleQueue[Flight | None] = queue.SimpleQueue()
    engine = Engine(
        pipeline=pipeline,
        costs=costs,
        usual_tokens=1,
        flights=flights,
        ready=ready,
        deliver=done.put,
        show=lambda flight, sample: None,
        give_up=lambda flight, error: _fail(error),
    )
    start = time.perf_counter()

    def feed() -> None:
        for index, arrival in enumerate(arrivals):
            _sleep_until(start + arrival.at)
            flight = Flight(Lease(f"job{index}", index, "token", 1, False, arrival.request))
            [flight.conditioning] = pipeline.encode([arrival.request])
            flights.add(flight)
            ready.put(flight)
        while not flights.wait_below(1, 1.0):
            continue
        engine.stopping.set()

    def deliver() -> None:
        while (flight := done.get()) is not None:
            assert flight.sample is not None
            pipeline.decode([flight.sample])
            finished[flight.lease.index] = time.perf_counter() - start
            flights.remove(flight)

    threads = [threading.Thread(target=feed), threading.Thread(target=deliver)]
    for thread in threads:
        thread.start()
    engine.run()
    done.put(None)
    for thread in threads:
        thread.join()
    return [at - arrival.at for at, arrival in zip(finished, arrivals, strict=True)]


def one_at_a_time(pipeline: Pipeline, costs: Costs, arrivals: Sequence[Arrival]) -> list[float]:
    """Each request alone, in order of arrival."""
    return _calls(pipeline, arrivals, lambda waiting: waiting[:1])


def whole_calls(pipeline: Pipeline, costs: Costs, arrivals: Sequence[Arrival]) -> list[float]:
    """The oldest request with all waiting ones of equal steps, up to the bucket that pays."""
    request = arrivals[0].request
    most = costs.largest(pipeline.rows(request) * pipeline.tokens(request))

    def equal(waiting: list[int]) -> list[int]:
        steps = arrivals[waiting[0]].request.steps
        return [i for i in waiting if arrivals[i].request.steps == steps][:most]

    return _calls(pipeline, arrivals, equal)


def solo_seconds(pipeline: Pipeline, request: ImageRequest) -> float:
    """Seconds of one request alone on an idle engine, encoding apart."""
    arrival = Arrival(0.0, request)
    return min(one_at_a_time(pipeline, Costs(()), [arrival])[0] for _ in range(3))


def _calls(
    pipeline: Pipeline, arrivals: Sequence[Arrival], take: Callable[[list[int]], list[int]]
) -> list[float]:
    latencies = [0.0] * len(arrivals)
    waiting: list[int] = []
    coming = 0
    start = time.perf_counter()
    while coming < len(arrivals) or waiting:
        if not waiting:
            _sleep_until(start + arrivals[coming].at)
        now = time.perf_counter() - start
        while coming < len(arrivals) and arrivals[coming].at <= now:
            waiting.append(coming)
            coming += 1
        batch = take(waiting) if waiting else []
        samples = [_started(pipeline, arrivals[i].request) for i in batch]
        while samples and not samples[0].done:
            pipeline.step(samples, max(b for b in BUCKETS if b <= len(samples)))
        for i, sample in zip(batch, samples, strict=True):
            pipeline.decode([sample])
            latencies[i] = time.perf_counter() - start - arrivals[i].at
            waiting.remove(i)
    return latencies


def _started(pipeline: Pipeline, request: ImageRequest) -> Sample:
    [conditioning] = pipeline.encode([request])
    return pipeline.start(request, conditioning)


def _sleep_until(when: float) -> None:
    time.sleep(max(0.0, when - time.perf_counter()))


def _fail(error: BaseException) -> None:
    raise RuntimeError("a benchmark's image failed") from error
