"""The denoising loop: runs forward passes over the samples in flight.

At every step boundary it admits samples from intake, drops those that were cancelled or lost, asks
the scheduler which samples share the next forward pass, and runs it: on this thread, or on others
if the pipeline runs several passes at once. Finished samples go to delivery. Doesn't use Redis or
files.

Two paths cross modules. Cancelling: cancel.lua marks the job's images, beat.lua's reply reports
them to the heartbeat, which calls `InFlight.drop`, and `_drop_cancelled` removes the sample at the
next step boundary. Out of memory: when a pass raises OutOfMemory, `_shrink` halves the group's
batch limit; a lone sample fails only after a try with no other pass running. Decoding is retried
in tiles; if that fails too, `Delivery` fails the image only if the worker holds no other.
"""

import queue
import statistics
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import structlog
import torch

from jobs.errors import GroupLost, ImageFailed, OutOfMemory
from jobs.runtime import tracing
from pipelines.seam import ROUND, Pipeline, Sample
from workers.costs import Learner
from workers.in_flight import InFlight, InFlightImages
from workers.phases import Phase, Phases
from workers.scheduler import (
    BUCKETS,
    Candidate,
    Costs,
    Forward,
    choose,
    in_order,
    no_trial,
    overtaken,
)
from workers.slots import Slots, first_done

log = structlog.get_logger(__name__)

IDLE_SECONDS = 0.5
"""How long an idle engine waits for a sample before it checks its stop flag again."""

ARRIVAL_SECONDS = 0.01
"""How long an engine with a free slot waits for a running pass before it checks for arrivals."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """A running forward pass: its flights, and each one's step before it.

    `candidates` are those in flight when the scheduler chose it; empty if it wasn't chosen.
    """

    batch: list[InFlight]
    before: list[int]
    forward: Forward
    alone: bool
    candidates: Sequence[Candidate] = ()
    began: float = field(default_factory=time.monotonic)


class Engine:
    """Runs forward passes until `stopping` is set; call `run` on one thread only.

    Once `stopping` is set, no sample is started any more, unstarted ones are given back at the next
    step boundary, and `run` returns when the rest have finished. Set `surplus` to give that many
    unstarted samples back at the next step boundary.

    `usual_tokens` is rows x tokens of a request of the model's default size. `phases` are the
    worker's, if its pipeline is phased; `round_over` is called when the denoising phase has ended.
    `costs` come from the warm-up; a `learner` replaces them with its own.

    `run` raises GroupLost, after which this worker can't finish any image. `suspects` are then the
    flights that were in a forward pass at that moment.
    """

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        costs: Costs,
        usual_tokens: int,
        flights: InFlightImages,
        ready: queue.SimpleQueue[InFlight],
        deliver: Callable[[InFlight], None],
        show: Callable[[InFlight, Sample], None],
        give_up: Callable[[InFlight, BaseException], None],
        phases: Phases | None = None,
        round_over: Callable[[], None] = lambda: None,
        give_back: Callable[[InFlight], None] = lambda _: None,
        learner: Learner | None = None,
    ) -> None:
        self.stopping = threading.Event()
        self.steps = 0
        self.surplus = 0
        self.suspects: list[InFlight] = []
        self.slots = Slots(pipeline, learner)
        self._pipeline, self._flights = pipeline, flights
        self._measured, self._learner = costs, learner
        self._usual_tokens = usual_tokens
        self._ready, self._deliver, self._show, self._give_up = ready, deliver, show, give_up
        self._phases = phases or Phases(phased=False)
        self._round_over, self._give_back = round_over, give_back
        self._running: dict[str, InFlight] = {}
        self._ceilings: dict[Hashable, int] = {}
        self._passes: dict[Future[None], _Pass] = {}
        self._alone_next: str | None = None

    def capacity(self) -> int:
        """How many images this worker should hold, given the sizes it runs now."""
        if self._phases.phased:
            return ROUND
        running = [self._tokens(flight) for flight in list(self._running.values())]
        usual = statistics.median_low(running) if running else self._usual_tokens
        return self._costs.held(usual, self.slots.count)

    @property
    def _costs(self) -> Costs:
        return self._learner.costs if self._learner else self._measured

    @property
    def unstarted(self) -> int:
        """Number of samples that haven't made a step yet."""
        return sum(flight.step == 0 for flight in list(self._running.values()))

    def run(self) -> None:
        """Loop until `stopping` is set and every sample in flight is done or dropped."""
        while self._turn():
            continue
        self.slots.close()

    def _turn(self) -> bool:
        """Handle one step boundary and its forward passes; False when there's nothing left."""
        self._pipeline.check()
        if self._phases.wait(Phase.DENOISE, IDLE_SECONDS):
            if not self.stopping.is_set():
                self._admit(wait=not self._running and not self._phases.phased)
            self._drop_cancelled()
            self._give_back_unstarted()
            if self.slots.count == 1:
                self._advance_one()
            else:
                self._advance_many()
            if self._phases.phased and not self._running:
                self._phases.end(Phase.DENOISE)
                self._round_over()
        return bool(self._running) or not self.stopping.is_set()

    def _advance_one(self) -> None:
        candidates = self._candidates()
        learner = self._learner
        trial = learner.trial if learner else no_trial
        forward = choose(candidates, self._costs, self._ceilings, trial=trial)
        if forward:
            self._advance([self._running[key] for key in forward.keys], forward, candidates)

    def _advance_many(self) -> None:
        """Fill the free slots, wait for a pass to end, and conclude those that did.

        A sample that ran out of memory next to other passes runs once they have all ended.
        """
        if self._alone_next is None:
            self._fill()
        elif not self._passes:
            flight, self._alone_next = self._running.get(self._alone_next), None
            if flight is not None:
                self._advance([flight], Forward((flight.lease.key,), self._lone_bucket(flight)))
        is_full = len(self._passes) == self.slots.count
        for done in first_done(list(self._passes), IDLE_SECONDS if is_full else ARRIVAL_SECONDS):
            self._conclude(self._passes.pop(done), done.result)

    def _fill(self) -> None:
        while len(self._passes) < self.slots.count:
            busy = self._busy()
            candidates = self._candidates()
            idle = [c for c in candidates if c.key not in busy]
            forward = choose(
                idle,
                self._costs,
                self._ceilings,
                slots=self.slots.count,
                running=len(self._passes),
                busy=[c for c in candidates if c.key in busy],
            )
            if forward is None:
                return
            batch = [self._running[key] for key in forward.keys]
            started = _pass(batch, forward, idle, alone=False)
            samples = [flight.sample for flight in batch if flight.sample]
            self._passes[self.slots.start(samples, forward.bucket)] = started

    def _busy(self) -> set[str]:
        """Keys of the samples in a running forward pass."""
        return {key for running in self._passes.values() for key in running.forward.keys}

    def _lone_bucket(self, flight: InFlight) -> int:
        """The bucket for this sample when it runs without others."""
        if not flight.lease.request.reproducible:
            return 1
        ceiling = self._ceilings.get(self._pipeline.batch_key(flight.lease.request), BUCKETS[-1])
        return min(self._costs.pinned(self._tokens(flight)), ceiling)

    def _admit(self, *, wait: bool) -> None:
        """Start every sample whose prompt is encoded; if `wait`, wait a moment for the first."""
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

    def _start(self, flight: InFlight) -> None:
        assert flight.conditioning is not None
        try:
            flight.sample = self._pipeline.start(flight.lease.request, flight.conditioning)
        except (torch.AcceleratorError, GroupLost):
            raise
        except Exception as error:
            self._give_up(flight, error)
            return
        flight.ready = time.monotonic()
        self._running[flight.lease.key] = flight

    def _drop_cancelled(self) -> None:
        busy = self._busy()
        for key, flight in list(self._running.items()):
            if flight.dropped and key not in busy:
                del self._running[key]
                self._flights.remove(flight)

    def _give_back_unstarted(self) -> None:
        """Give back the samples that would start last: the surplus, or all when stopping."""
        count, self.surplus = self.surplus, 0
        if self.stopping.is_set():
            count = len(self._running)
        if not count:
            return
        busy = self._busy()
        order = [c.key for c in in_order(self._candidates(), self._costs) if c.key not in busy]
        started = {key for key, flight in self._running.items() if flight.step}
        for key in [key for key in reversed(order) if key not in started][:count]:
            self._give_back(self._running.pop(key))

    def _tokens(self, flight: InFlight) -> int:
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
                steps=flight.sample.steps,
                remaining=flight.sample.steps - flight.sample.step,
                age=flight.lease.age + now - flight.claimed,
                waited=now - flight.ready - flight.ran,
                reproducible=flight.lease.request.reproducible,
                passed=flight.passed,
            )
            for key, flight in self._running.items()
            if flight.sample
        ]

    def _advance(
        self, batch: list[InFlight], forward: Forward, candidates: Sequence[Candidate] = ()
    ) -> None:
        samples = [flight.sample for flight in batch if flight.sample]
        run = _pass(batch, forward, candidates, alone=not self._passes)
        self._conclude(run, lambda: self.slots.run(samples, forward.bucket))

    def _conclude(self, ended: _Pass, outcome: Callable[[], None]) -> None:
        """Handle the end of a pass; on failure, narrow it down to the sample at fault.

        `outcome` returns, or raises whatever the pass raised.
        """
        try:
            outcome()
        except OutOfMemory as error:
            self._shrink(ended, error)
            return
        except GroupLost:
            # Any of the running samples may have killed a rank. The worker lets their leases
            # expire, so each comes back to run alone.
            self.suspects = [*ended.batch, *(f for p in self._passes.values() for f in p.batch)]
            raise
        except torch.AcceleratorError:
            raise  # the device's context is unusable now, so retrying any sample would fail too
        except Exception as error:
            self._blame(ended, error)
            return
        seconds = time.monotonic() - ended.began
        for flight in ended.batch:
            flight.ran += seconds
        # Concurrent passes each charge the same wall time, so each counts for its part only.
        self._count_overtaken(ended, seconds / self.slots.count)
        self._settle(ended.batch, ended.forward.bucket)

    def _count_overtaken(self, ended: _Pass, seconds: float) -> None:
        """Charge the time that newer samples took in this pass to those that waited."""
        members = [c for c in ended.candidates if c.key in ended.forward.keys]
        for waiting in ended.candidates:
            flight = self._running.get(waiting.key)
            if flight is not None and waiting.key not in ended.forward.keys:
                flight.passed = flight.passed.plus(overtaken(waiting, members), seconds)

    def _settle(self, batch: list[InFlight], bucket: int) -> None:
        """Deliver finished samples, fail those with an error of their own, keep the rest."""
        for flight in batch:
            sample = flight.sample
            assert sample is not None
            self.steps += 1 if self._pipeline.card.joins else sample.steps
            any_up_to = self._costs.any_up_to(self._pipeline.batch_key(flight.lease.request))
            made_in = 1 if bucket <= any_up_to else bucket  # the bits are a lone sample's
            if flight.lease.request.reproducible and flight.bucket not in (0, made_in):
                self._restart(flight)
                continue
            flight.bucket = made_in
            if sample.error is None and not sample.done:
                self._preview(flight, sample)
                continue
            del self._running[flight.lease.key]
            if sample.error is not None:
                self._give_up(flight, ImageFailed(sample.error))
            elif flight.dropped:
                self._flights.remove(flight)
            else:
                lease, seconds = flight.lease, time.monotonic() - flight.ready
                tracing.record(lease.trace, "denoise", seconds, image=lease.key, steps=sample.steps)
                self._deliver(flight)

    def _restart(self, flight: InFlight) -> None:
        """Restart a reproducible sample whose bucket shrank: all its steps must use one bucket."""
        log.info("restarting image in a smaller bucket", image=flight.lease.key)
        del self._running[flight.lease.key]
        flight.bucket = 0
        self._start(flight)

    def _preview(self, flight: InFlight, sample: Sample) -> None:
        """Send a copy for a preview, once per heartbeat while a client asks for one."""
        if flight.wished:
            flight.wished = False
            self._show(flight, replace(sample, extra=dict(sample.extra)))

    def _shrink(self, failed: _Pass, error: OutOfMemory) -> None:
        """Halve the group's batch limit; a sample that doesn't fit on its own fails.

        Nothing is run here: the pass changed no sample, so the scheduler can choose again.
        """
        batch, bucket = failed.batch, failed.forward.bucket
        group = self._pipeline.batch_key(batch[0].lease.request)
        if bucket > 1:
            # Halve the bucket, not the number of samples: the padding used memory too. A smaller
            # limit, set by a concurrent pass that failed first, stays. It's kept for the worker's
            # life, because a batch that nearly fits would fail again and again.
            self._ceilings[group] = min(bucket // 2, self._ceilings.get(group, bucket))
            log.warning("out of memory", samples=len(batch), ceiling=self._ceilings[group])
        elif not failed.alone:
            # The other passes held memory as well, so this says nothing about the sample itself.
            # `_advance_many` retries it once they have ended.
            self._alone_next = batch[0].lease.key
        else:
            del self._running[batch[0].lease.key]
            self._give_up(batch[0], ImageFailed(f"doesn't fit in the device's memory: {error}"))

    def _blame(self, failed: _Pass, error: Exception) -> None:
        """Run the failed pass's samples one by one, and fail those that fail alone."""
        if len(failed.batch) == 1:
            del self._running[failed.batch[0].lease.key]
            self._give_up(failed.batch[0], error)
            return
        log.warning("forward pass failed; running its samples alone", error=str(error))
        for flight, step in zip(failed.batch, failed.before, strict=True):
            # The pass may have failed after some samples had made their step; another one would
            # skip a sigma. Those that didn't keep their bucket even alone, because a reproducible
            # sample's bits depend on it.
            if flight.sample and flight.sample.step == step:
                self._advance([flight], Forward((flight.lease.key,), failed.forward.bucket))
            else:
                self._settle([flight], failed.forward.bucket)


def _pass(
    batch: list[InFlight], forward: Forward, candidates: Sequence[Candidate], *, alone: bool
) -> _Pass:
    steps = [flight.sample.step for flight in batch if flight.sample]
    return _Pass(batch, steps, forward, alone, candidates)
