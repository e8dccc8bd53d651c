"""Runs forward passes: on the calling thread, or several at once on threads of their own.

Also keeps time: the seconds during which at least one pass ran, and when the oldest running pass
began. Doesn't decide what runs.
"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace

from jobs.reports import WorkerReport
from pipelines.seam import Pipeline, Sample
from workers.costs import Learner, Stopwatch
from workers.metrics import ForwardCounts, cache_counts


class Slots:
    """One slot for each forward pass that the pipeline can run at once. Only the engine uses it."""

    def __init__(self, pipeline: Pipeline, learner: Learner | None = None) -> None:
        self._learner = learner
        self.count = count = pipeline.in_flight
        self.forwards = 0
        self.busy_seconds = 0.0
        self._counts = ForwardCounts()
        self._pipeline = pipeline
        self._lock = threading.Lock()
        self._begun: list[float] = []
        self._counted_to = 0.0
        self._threads = ThreadPoolExecutor(count, "forward") if count > 1 else None

    @property
    def oldest(self) -> float | None:
        """When the longest-running forward pass began, by the monotonic clock; None if idle."""
        with self._lock:
            return min(self._begun, default=None)

    def run(self, samples: Sequence[Sample], bucket: int) -> None:
        """Run one forward pass on this thread."""
        began = self._enter()
        stopwatch = Stopwatch(on_cpu=self._learner is not None and self._learner.on_cpu)
        try:
            self._pipeline.step(samples, bucket)
        finally:
            self._leave(began)
        passes = 1 if self._pipeline.card.joins else samples[0].steps
        rows, tokens = self._pipeline.rows, self._pipeline.tokens
        sizes = [rows(sample.request) * tokens(sample.request) for sample in samples]
        self._learn(sizes, bucket, stopwatch.seconds() / passes)
        all_tokens = passes * sum(sizes)
        pixel_steps = passes * sum(sample.request.pixels for sample in samples)
        self._counts.forward(len(samples), all_tokens, pixel_steps, time.monotonic() - began)

    def _learn(self, tokens: Sequence[int], bucket: int, seconds: float) -> None:
        """Record the cost of a pass over samples of one size.

        Concurrent passes slow each other down, so their times aren't the cost of a bucket.
        """
        if self._learner is not None and self.count == 1 and len(set(tokens)) == 1:
            self._learner.observe(tokens[0], max(bucket, len(tokens)), seconds)

    def start(self, samples: Sequence[Sample], bucket: int) -> "Future[None]":
        """Run one forward pass on another thread; the caller makes sure that a slot is free."""
        assert self._threads is not None
        return self._threads.submit(self.run, samples, bucket)

    def added_to(self, report: WorkerReport) -> WorkerReport:
        """The report with counts of forward passes and cached prompts; it has `in_flight`."""
        counted = replace(report, forwards=self.forwards, busy_seconds=self.busy_seconds)
        return replace(
            self._counts.added_to(counted),
            prompt_cache=cache_counts(self._pipeline),
            buckets=self._learner.buckets() if self._learner else None,
        )

    def close(self) -> None:
        """End the threads. No forward pass may be running."""
        if self._threads is not None:
            self._threads.shutdown()

    def _enter(self) -> float:
        now = time.monotonic()
        with self._lock:
            if not self._begun:
                self._counted_to = now
            self._begun.append(now)
        return now

    def _leave(self, began: float) -> None:
        now = time.monotonic()
        with self._lock:
            self._begun.remove(began)
            self.busy_seconds += now - self._counted_to
            self._counted_to = now
            self.forwards += 1


def first_done(passes: Sequence["Future[None]"], seconds: float) -> list["Future[None]"]:
    """Wait up to `seconds` for any pass to end; return those that have, in the same order."""
    wait(passes, seconds, FIRST_COMPLETED)
    return [future for future in passes if future.done()]
