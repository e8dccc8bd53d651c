"""Policies: ways to serve one trace of arrivals with one model, for the benchmarks to compare.

`stepwise` is our engine. `one_at_a_time` runs each request alone, in order of arrival, as a simple
server does. `whole_calls` batches waiting requests with equal steps, and runs each batch from start
to end before it takes the next. Servers of both kinds encode and decode within the call, and so do
these two, whereas our engine has threads for that. `decoding_aside` shows how much the threads
matter: it's one at a time with a decoding thread. All run the same forward passes of the same
pipeline.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from jobs.job import Lease
from jobs.request import ImageRequest
from pipelines.seam import Pipeline, Sample
from workers.engine import Engine
from workers.in_flight import InFlight, InFlightImages
from workers.scheduler import BUCKETS, Costs


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request and its arrival, in seconds from the start."""

    at: float
    request: ImageRequest


Policy = Callable[[Pipeline, Costs, Sequence[Arrival]], list[float]]
"""Serves the arrivals; returns the seconds from each arrival to its decoded pixels, in order."""


def stepwise(pipeline: Pipeline, costs: Costs, arrivals: Sequence[Arrival]) -> list[float]:
    """Our engine: step-level batching, least remaining work first.

    As in a worker, prompts are encoded and samples decoded on separate threads. Every request
    counts as a job of its own, so the engine holds as many images as a full worker takes in from
    other jobs. The rest wait outside, in order of arrival.
    """
    return _Stepwise(pipeline, costs, arrivals).run()


class _Stepwise:
    """One trace through our engine, on three threads: arrivals, forward passes, decoding."""

    def __init__(self, pipeline: Pipeline, costs: Costs, arrivals: Sequence[Arrival]) -> None:
        request = arrivals[0].request
        self._pipeline, self._arrivals = pipeline, arrivals
        self._latencies = [0.0] * len(arrivals)
        self._flights = InFlightImages()
        self._ready: queue.SimpleQueue[InFlight] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[InFlight | None] = queue.SimpleQueue()
        self._errors: list[BaseException] = []
        self._engine = Engine(
            pipeline=pipeline,
            costs=costs,
            usual_tokens=pipeline.rows(request) * pipeline.tokens(request),
            flights=self._flights,
            ready=self._ready,
            deliver=self._done.put,
            show=lambda flight, sample: None,
            give_up=lambda flight, error: self._fail(error),
        )

    def run(self) -> list[float]:
        """Seconds from each arrival to its pixels. Raises RuntimeError if an image fails."""
        self._start = time.perf_counter()
        threads = [
            threading.Thread(target=self._guarded, args=(part,), daemon=True)
            for part in (self._feed, self._decode)
        ]
        for thread in threads:
            thread.start()
        self._engine.run()
        self._done.put(None)
        for thread in threads:
            thread.join()
        if self._errors:
            raise RuntimeError("a benchmark's image failed") from self._errors[0]
        return self._latencies

    def _feed(self) -> None:
        """Take in requests as they arrive and while there's room; then end the engine."""
        for index, arrival in enumerate(self._arrivals):
            _sleep_until(self._start + arrival.at)
            self._wait_for_room()
            if self._errors:
                return
            age = time.perf_counter() - self._start - arrival.at
            lease = Lease(f"job{index}", index, "token", 1, False, arrival.request, age=age)
            flight = InFlight(lease)
            self._flights.add(flight)
            [flight.conditioning] = self._pipeline.encode([arrival.request])
            self._ready.put(flight)
        while not self._errors and not self._flights.wait_below(1, 1.0):
            continue
        self._engine.stopping.set()

    def _wait_for_room(self) -> None:
        while not self._errors and not self._flights.wait_below(2 * self._engine.capacity(), 1.0):
            continue

    def _decode(self) -> None:
        while (flight := self._done.get()) is not None:
            assert flight.sample is not None
            self._pipeline.decode([flight.sample])
            index = flight.lease.index
            self._latencies[index] = time.perf_counter() - self._start - self._arrivals[index].at
            self._flights.remove(flight)

    def _guarded(self, part: Callable[[], None]) -> None:
        try:
            part()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._errors.append(error)
        self._engine.stopping.set()


def one_at_a_time(pipeline: Pipeline, costs: Costs, arrivals: Sequence[Arrival]) -> list[float]:
    """Each request alone, in order of arrival."""
    return _calls(pipeline, arrivals, lambda waiting: waiting[:1])


def decoding_aside(pipeline: Pipeline, costs: Costs, arrivals: Sequence[Arrival]) -> list[float]:
    """Each request alone, in order of arrival; it starts while the previous one is decoded."""
    return _calls(pipeline, arrivals, lambda waiting: waiting[:1], aside=True)


def whole_calls(pipeline: Pipeline, costs: Costs, arrivals: Sequence[Arrival]) -> list[float]:
    """The oldest request with all waiting ones of equal steps, up to the largest useful bucket."""
    request = arrivals[0].request
    most = costs.largest(pipeline.rows(request) * pipeline.tokens(request))

    def equal(waiting: list[int]) -> list[int]:
        steps = arrivals[waiting[0]].request.steps
        return [i for i in waiting if arrivals[i].request.steps == steps][:most]

    return _calls(pipeline, arrivals, equal)


def solo_seconds(pipeline: Pipeline, request: ImageRequest) -> float:
    """Seconds of one request alone on an idle engine, without encoding."""
    arrival = Arrival(0.0, request)
    return min(one_at_a_time(pipeline, Costs(()), [arrival])[0] for _ in range(2))


def _calls(
    pipeline: Pipeline,
    arrivals: Sequence[Arrival],
    take: Callable[[list[int]], list[int]],
    *,
    aside: bool = False,
) -> list[float]:
    """Run the requests that `take` picks until all are done; decode on a thread if `aside`."""
    latencies = [0.0] * len(arrivals)
    waiting: list[int] = []
    decoded: list[Future[None]] = []
    coming = 0
    start = time.perf_counter()

    def decode(index: int, sample: Sample) -> None:
        pipeline.decode([sample])
        latencies[index] = time.perf_counter() - start - arrivals[index].at

    with ThreadPoolExecutor(1, "decode") as decoder:
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
                waiting.remove(i)
                if aside:
                    decoded.append(decoder.submit(decode, i, sample))
                else:
                    decode(i, sample)
    for future in decoded:
        future.result()
    return latencies


def _started(pipeline: Pipeline, request: ImageRequest) -> Sample:
    [conditioning] = pipeline.encode([request])
    return pipeline.start(request, conditioning)


def _sleep_until(when: float) -> None:
    time.sleep(max(0.0, when - time.perf_counter()))
