"""The denoising loop: all samples in flight advance together, one forward pass at a time.

At every step boundary it takes in what intake made ready, lets go of what was cancelled or lost,
asks the scheduler who shares the next forward pass, and runs it. Finished samples go to delivery.
Decides what an out-of-memory and a poisonous sample mean. Knows no Redis and no files.
"""

import queue
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import replace

import structlog
import torch

from jobs.errors import ImageFailed, OutOfMemory, PipelineError
from pipelines.seam import Pipeline, Sample
from workers.flights import Flight, Flights
from workers.scheduler import BUCKETS, Candidate, Costs, Forward, choose

log = structlog.get_logger(__name__)

IDLE_SECONDS = 0.5
"""How long an idle engine waits for a sample before it looks at its stop flag again."""


class Engine:
    """Runs forward passes on the calling thread until told to stop.

    `usual_tokens` are those of a request of the model's default size, rows counted.
    Once `stopping` is set nothing more is started, and `run` returns when what runs has finished.
    """

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        costs: Costs,
        usual_tokens: int,
        flights: Flights,
        ready: queue.SimpleQueue[Flight],
        deliver: Callable[[Flight], None],
        show: Callable[[Flight, Sample], None],
        give_up: Callable[[Flight, BaseException], None],
    ) -> None:
        self.stopping = threading.Event()
        self.steps = 0
        self.forwards = 0
        self.busy_seconds = 0.0
        self.forward_started: float | None = None
        self._pipeline, self._costs, self._flights = pipeline, costs, flights
        self._usual_tokens = usual_tokens
        self._ready, self._deliver, self._show, self._give_up = ready, deliver, show, give_up
        self._running: dict[str, Flight] = {}
        self._ceilings: dict[Hashable, int] = {}

    def capacity(self) -> int:
        """How many images this worker should hold, by the largest that it runs now."""
        running = [self._tokens(flight) for flight in list(self._running.values())]
        return self._costs.held(max(running, default=self._usual_tokens))

    def run(self) -> None:
        """The loop; returns when told to stop and the samples in flight are done or dropped."""
        while True:
            if not self.stopping.is_set():
                self._admit(wait=not self._running)
            self._let_go()
            forward = choose(self._candidates(), self._costs, self._ceilings)
            if forward:
                self._advance([self._running[key] for key in forward.keys], forward)
            elif self.stopping.is_set():
                return

    def _admit(self, *, wait: bool) -> None:
        """Start every sample whose prompt is encoded; wait a moment when there is nothing else."""
        try:
            flight = self._ready.get(timeout=IDLE_SECONDS) if wait else self._ready.get_nowait()
            while True:
                if not flight.dropped:
                    self._start(flight)
                else:
                    self._flights.remove(flight)
                flight = self._ready.get_nowait()
        except queue.Empty:
            return

    def _start(self, flight: Flight) -> None:
        assert flight.conditioning is not None
        try:
            flight.sample = self._pipeline.start(flight.lease.request, flight.conditioning)
        except torch.AcceleratorError:
            raise
        except (PipelineError, RuntimeError, ValueError, TypeError) as error:
            self._give_up(flight, error)
            return
        flight.ready = time.monotonic()
        self._running[flight.lease.key] = flight

    def _let_go(self) -> None:
        for key, flight in list(self._running.items()):
            if flight.dropped:
                del self._running[key]
                self._flights.remove(flight)

    def _tokens(self, flight: Flight) -> int:
        request = flight.lease.request
        return self._pipeline.rows(request) * self._pipeline.tokens(request)

    def _candidates(self) -> list[Candidate]:
        now = time.monotonic()
        return [
            Candidate(
                key=key,
                job=flight.lease.job_id,
                priority=flight.lease.priority,
                group=self._pipeline.batch_key(flight.lease.request),
                tokens=self._tokens(flight),
                remaining=flight.sample.steps - flight.sample.step,
                waited=now - flight.ready,
                reproducible=flight.lease.request.reproducible,
            )
            for key, flight in self._running.items()
            if flight.sample
        ]

    def _advance(self, batch: list[Flight], forward: Forward) -> None:
        """One forward pass; on failure a smaller one, down to the one sample that is to blame."""
        samples = [flight.sample for flight in batch if flight.sample]
        before = [sample.step for sample in samples]
        try:
            self._forward(samples, forward.bucket)
        except OutOfMemory as error:
            self._shrink(batch, error)
            return
        except torch.AcceleratorError:
            raise
        except (ImageFailed, RuntimeError, ValueError, TypeError) as error:
            self._blame(batch, before, forward, error)
            return
        self._settle(batch, forward.bucket)

    def _forward(self, samples: list[Sample], bucket: int) -> None:
        started = self.forward_started = time.monotonic()
        try:
            self._pipeline.step(samples, bucket)
        finally:
            self.forward_started = None
            self.busy_seconds += time.monotonic() - started
        self.forwards += 1

    def _settle(self, batch: list[Flight], bucket: int) -> None:
        """Send on what is finished, fail what went wrong alone, keep the rest."""
        for flight in batch:
            sample = flight.sample
            assert sample is not None
            self.steps += 1 if self._pipeline.card.joins else sample.steps
            flight.bucket = bucket
            if sample.error is None and not sample.done:
                self._preview(flight, sample)
                continue
            del self._running[flight.lease.key]
            if sample.error is not None:
                self._give_up(flight, ImageFailed(sample.error))
            elif flight.dropped:
                self._flights.remove(flight)
            else:
                self._deliver(flight)

    def _preview(self, flight: Flight, sample: Sample) -> None:
        """Hand on the sample as it stands, once a beat while somebody wishes to see it."""
        if flight.wished:
            flight.wished = False
            self._show(flight, replace(sample, extra=dict(sample.extra)))

    def _shrink(self, batch: list[Flight], error: OutOfMemory) -> None:
        """Halve the group's forward batch; a sample that does not fit alone fails."""
        group = self._pipeline.batch_key(batch[0].lease.request)
        if len(batch) > 1:
            self._ceilings[group] = max(b for b in BUCKETS if b <= max(1, len(batch) // 2))
            log.warning("out of memory", samples=len(batch), ceiling=self._ceilings[group])
            return
        if self._ceilings.get(group) != 1:
            self._ceilings[group] = 1
            return
        del self._running[batch[0].lease.key]
        self._give_up(batch[0], ImageFailed(f"does not fit the device's memory: {error}"))

    def _blame(
        self, batch: list[Flight], before: list[int], forward: Forward, error: Exception
    ) -> None:
        """Run each sample that the failed pass left behind alone, and fail the one that fails."""
        if len(batch) == 1:
            del self._running[batch[0].lease.key]
            self._give_up(batch[0], error)
            return
        log.warning("forward pass failed; running its samples alone", error=str(error))
        for flight, step in zip(batch, before, strict=True):
            if flight.sample and flight.sample.step == step:
                self._advance([flight], Forward((flight.lease.key,), forward.bucket))
            else:
                self._settle([flight], forward.bucket)
