"""The denoising loop: samples in flight advance together, a forward pass at a time or several.

At every step boundary it takes in what intake made ready, lets go of what was cancelled or lost,
asks the scheduler who shares the next forward pass, and runs it: itself, or on another thread where
the pipeline takes several at once. Finished samples go to delivery. Decides what an out-of-memory
and a poisonous sample mean; a lost group ends it. Knows no Redis and no files.
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
from workers.in_flight import Flight, Flights
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
"""How long an idle engine waits for a sample before it looks at its stop flag again."""

ARRIVAL_SECONDS = 0.01
"""How long an engine with a free slot waits for a running pass before it looks for arrivals."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """A forward pass on its way: its flights, and the step that each was at before it.

    `candidates` are those that were in flight when it was chosen; none if it wasn't chosen.
    """

    batch: list[Flight]
    before: list[int]
    forward: Forward
    alone: bool
    candidates: Sequence[Candidate] = ()
    began: float = field(default_factory=time.monotonic)


class Engine:
    """Runs forward passes until told to stop; `run` is called on one thread.

    `usual_tokens` are those of a request of the model's default size, rows counted.
    Once `stopping` is set nothing more is started, what has not begun is given back at the next
    step boundary, and `run` returns when the rest has finished. `phases` are the worker's, where
    its stages take turns; `round_over` is called when the denoising phase has ended. `surplus` is
    set to have so many samples that have not begun given back, at the next step boundary.
    `costs` are those of the warm-up; where there is a `learner`, its own count instead.
    GroupLost leaves `run`: no image of this worker can go on then, and `suspects` are those that
    ran when the group was lost.
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
        phases: Phases | None = None,
        round_over: Callable[[], None] = lambda: None,
        give_back: Callable[[Flight], None] = lambda _: None,
        learner: Learner | None = None,
    ) -> None:
        self.stopping = threading.Event()
        self.steps = 0
        self.surplus = 0
        self.suspects: list[Flight] = []
        self.slots = Slots(pipeline, learner)
        self._pipeline, self._flights = pipeline, flights
        self._measured, self._learner = costs, learner
        self._usual_tokens = usual_tokens
        self._ready, self._deliver, self._show, self._give_up = ready, deliver, show, give_up
        self._phases = phases or Phases(phased=False)
        self._round_over, self._give_back = round_over, give_back
        self._running: dict[str, Flight] = {}
        self._ceilings: dict[Hashable, int] = {}
        self._passes: dict[Future[None], _Pass] = {}
        self._cramped: str | None = None

    def capacity(self) -> int:
        """How many images this worker should hold, by the size of those that it runs now."""
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
        """Samples that have not made a step."""
        return sum(flight.step == 0 for flight in list(self._running.values()))

    def run(self) -> None:
        """The loop; returns when told to stop and the samples in flight are done or dropped."""
        while self._turn():
            continue
        self.slots.close()

    def _turn(self) -> bool:
        """One step boundary, and the forward passes that it leads to; False when all is over."""
        self._pipeline.check()
        if self._phases.wait(Phase.DENOISE, IDLE_SECONDS):
            if not self.stopping.is_set():
                self._admit(wait=not self._running and not self._phases.phased)
            self._let_go()
            self._part_with_unbegun()
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
        """Fill the free slots, then wait for one of the passes and deal with those that are done.

        A sample that found no memory beside other passes is run when they have all ended.
        """
        if self._cramped is None:
            self._fill()
        elif not self._passes:
            flight, self._cramped = self._running.get(self._cramped), None
            if flight is not None:
                self._advance([flight], Forward((flight.lease.key,), self._alone(flight)))
        is_full = len(self._passes) == self.slots.count
        for done in first_done(list(self._passes), IDLE_SECONDS if is_full else ARRIVAL_SECONDS):
            self._conclude(self._passes.pop(done), done.result)

    def _fill(self) -> None:
        while len(self._passes) < self.slots.count:
            busy = {key for one in self._passes.values() for key in one.forward.keys}
            everybody = self._candidates()
            idle = [c for c in everybody if c.key not in busy]
            forward = choose(
                idle,
                self._costs,
                self._ceilings,
                slots=self.slots.count,
                running=len(self._passes),
                busy=[c for c in everybody if c.key in busy],
            )
            if forward is None:
                return
            batch = [self._running[key] for key in forward.keys]
            one = _pass(batch, forward, idle, alone=False)
            samples = [flight.sample for flight in one.batch if flight.sample]
            self._passes[self.slots.start(samples, forward.bucket)] = one

    def _alone(self, flight: Flight) -> int:
        """The bucket in which this sample runs when no other does."""
        if not flight.lease.request.reproducible:
            return 1
        ceiling = self._ceilings.get(self._pipeline.batch_key(flight.lease.request), BUCKETS[-1])
        return min(self._costs.pinned(self._tokens(flight)), ceiling)

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
        except (torch.AcceleratorError, GroupLost):
            raise
        except Exception as error:
            self._give_up(flight, error)
            return
        flight.ready = time.monotonic()
        self._running[flight.lease.key] = flight

    def _let_go(self) -> None:
        busy = {key for one in self._passes.values() for key in one.forward.keys}
        for key, flight in list(self._running.items()):
            if flight.dropped and key not in busy:
                del self._running[key]
                self._flights.remove(flight)

    def _part_with_unbegun(self) -> None:
        """Give back what would begin last: as many as are surplus, or all when this is the end."""
        count, self.surplus = self.surplus, 0
        if self.stopping.is_set():
            count = len(self._running)
        if not count:
            return
        busy = {key for one in self._passes.values() for key in one.forward.keys}
        order = [c.key for c in in_order(self._candidates(), self._costs) if c.key not in busy]
        begun = {key for key, flight in self._running.items() if flight.step}
        for key in [key for key in reversed(order) if key not in begun][:count]:
            self._give_back(self._running.pop(key))

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
        self, batch: list[Flight], forward: Forward, candidates: Sequence[Candidate] = ()
    ) -> None:
        """One forward pass on this thread."""
        samples = [flight.sample for flight in batch if flight.sample]
        one = _pass(batch, forward, candidates, alone=not self._passes)
        self._conclude(one, lambda: self.slots.run(samples, forward.bucket))

    def _conclude(self, one: _Pass, outcome: Callable[[], None]) -> None:
        """What a pass has come to; on failure a smaller one, down to the sample that is to blame.

        `outcome` returns, or raises what the pass raised.
        """
        try:
            outcome()
        except OutOfMemory as error:
            self._shrink(one, error)
            return
        except GroupLost:
            self.suspects = [*one.batch, *(f for p in self._passes.values() for f in p.batch)]
            raise
        except torch.AcceleratorError:
            raise
        except Exception as error:
            self._blame(one, error)
            return
        seconds = time.monotonic() - one.began
        for flight in one.batch:
            flight.ran += seconds
        self._count_overtaken(one, seconds / self.slots.count)
        self._settle(one.batch, one.forward.bucket)

    def _count_overtaken(self, one: _Pass, seconds: float) -> None:
        """Charge what newer samples in this pass took to those that waited meanwhile."""
        members = [c for c in one.candidates if c.key in one.forward.keys]
        for waiting in one.candidates:
            flight = self._running.get(waiting.key)
            if flight is not None and waiting.key not in one.forward.keys:
                flight.passed = flight.passed.plus(overtaken(waiting, members), seconds)

    def _settle(self, batch: list[Flight], bucket: int) -> None:
        """Send on what is finished, fail what went wrong alone, keep the rest."""
        for flight in batch:
            sample = flight.sample
            assert sample is not None
            self.steps += 1 if self._pipeline.card.joins else sample.steps
            if flight.lease.request.reproducible and flight.bucket not in (0, bucket):
                self._begin_again(flight)
                continue
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
                lease, taken = flight.lease, time.monotonic() - flight.ready
                tracing.record(lease.trace, "denoise", taken, image=lease.key, steps=sample.steps)
                self._deliver(flight)

    def _begin_again(self, flight: Flight) -> None:
        """Memory has changed a reproducible sample's bucket: its bits must be of one alone."""
        log.info("beginning again in another bucket", image=flight.lease.key)
        del self._running[flight.lease.key]
        flight.bucket = 0
        self._start(flight)

    def _preview(self, flight: Flight, sample: Sample) -> None:
        """Hand on the sample as it stands, once a beat while somebody wishes to see it."""
        if flight.wished:
            flight.wished = False
            self._show(flight, replace(sample, extra=dict(sample.extra)))

    def _shrink(self, one: _Pass, error: OutOfMemory) -> None:
        """Halve the group's forward batch; a sample that does not fit alone fails."""
        batch, bucket = one.batch, one.forward.bucket
        group = self._pipeline.batch_key(batch[0].lease.request)
        if bucket > 1:
            self._ceilings[group] = min(bucket // 2, self._ceilings.get(group, bucket))
            log.warning("out of memory", samples=len(batch), ceiling=self._ceilings[group])
        elif not one.alone:  # the passes beside it held memory too
            self._cramped = batch[0].lease.key
        else:
            del self._running[batch[0].lease.key]
            self._give_up(batch[0], ImageFailed(f"does not fit the device's memory: {error}"))

    def _blame(self, one: _Pass, error: Exception) -> None:
        """Run each sample that the failed pass left behind alone, and fail the one that fails."""
        if len(one.batch) == 1:
            del self._running[one.batch[0].lease.key]
            self._give_up(one.batch[0], error)
            return
        log.warning("forward pass failed; running its samples alone", error=str(error))
        for flight, step in zip(one.batch, one.before, strict=True):
            if flight.sample and flight.sample.step == step:
                self._advance([flight], Forward((flight.lease.key,), one.forward.bucket))
            else:
                self._settle([flight], one.forward.bucket)


def _pass(
    batch: list[Flight], forward: Forward, candidates: Sequence[Candidate], *, alone: bool
) -> _Pass:
    steps = [flight.sample.step for flight in batch if flight.sample]
    return _Pass(batch, steps, forward, alone, candidates)
