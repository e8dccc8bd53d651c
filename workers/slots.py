"""Where forward passes run: on the calling thread, or several at once on threads of their own.

Keeps the clock of what the denoiser did: seconds with a forward pass running, however many ran at
once, and when the oldest that runs now began. Decides nothing, and knows no flights.
"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from pipelines.seam import Pipeline, Sample
from workers.costs import Learner, Stopwatch
from workers.metrics import Measures, cache_counts


class Slots:
    """As many places for forward passes as the pipeline takes at once; the engine's alone."""

    def __init__(self, pipeline: Pipeline, learner: Learner | None = None) -> None:
        self._learner = learner
        self.count = count = pipeline.in_flight
        self.forwards = 0
        self.busy_seconds = 0.0
        self.measures = Measures()
        self._pipeline = pipeline
        self._lock = threading.Lock()
        self._begun: list[float] = []
        self._counted_to = 0.0
        self._threads = ThreadPoolExecutor(count, "forward") if count > 1 else None

    @property
    def oldest(self) -> float | None:
        """When the forward pass that has run longest began, by the monotonic clock."""
        with self._lock:
            return min(self._begun, default=None)

    def run(self, samples: Sequence[Sample], bucket: int) -> None:
        """One forward pass, here and now."""
        began = self._enter()
        stopwatch = Stopwatch(on_cpu=self._learner is not None and self._learner.on_cpu)
        try:
            self._pipeline.step(samples, bucket)
        finally:
            self._leave(began)
        passes = 1 if self._pipeline.card.joins else samples[0].steps
        rows, tokens = self._pipeline.rows, self._pipeline.tokens
        each = [rows(one.request) * tokens(one.request) for one in samples]
        self._learn(each, bucket, stopwatch.seconds() / passes)
        made = passes * sum(each)
        drawn = passes * sum(one.request.pixels for one in samples)
        self.measures.forward(len(samples), made, drawn, time.monotonic() - began)

    def _learn(self, tokens: Sequence[int], bucket: int, seconds: float) -> None:
        """Note what a pass over samples of one size cost; one beside others says nothing."""
        if self._learner is not None and self.count == 1 and len(set(tokens)) == 1:
            self._learner.observe(tokens[0], max(bucket, len(tokens)), seconds)

    def start(self, samples: Sequence[Sample], bucket: int) -> "Future[None]":
        """One forward pass on another thread; the caller sees to it that a slot is free."""
        assert self._threads is not None
        return self._threads.submit(self.run, samples, bucket)

    def describe(self, held: int = 0) -> dict[str, Any]:
        """What the forward passes came to, and the prompts before them; `held` samples are held."""
        counts = self.measures.describe(self.busy_seconds, held)
        buckets = self._learner.describe() if self._learner else None
        return {**counts, "prompt_cache": cache_counts(self._pipeline), "buckets": buckets}

    def close(self) -> None:
        """End the threads; none runs a forward pass any more."""
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
    """Wait for any of them, at most so long; those that are done, in the order given."""
    wait(passes, seconds, FIRST_COMPLETED)
    return [one for one in passes if one.done()]
