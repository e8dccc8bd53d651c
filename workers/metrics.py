"""Metrics of a worker's forward passes: batch sizes, seconds, tokens.

Counts start at zero with the worker and only grow. They're published with its registration.
Histograms are cumulative, as in Prometheus: each bucket counts the values up to its bound.
"""

import threading
import time
from dataclasses import replace
from itertools import accumulate

import torch

from jobs.reports import Histogram, WorkerReport

SIZES = (1, 2, 4, 8, 16, 32)
"""Upper bounds of the forward batch's histogram, in samples."""

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
"""Upper bounds of the forward pass's histogram."""

SMOOTHING = 0.3
"""Weight of the newest beat in the moving averages."""

CROWDED = 1.2
"""A worker that holds this many times the samples it runs at once has enough work."""


class ForwardCounts:
    """The counts of one worker; safe to call from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sizes = [0] * (len(SIZES) + 1)
        self._seconds = [0] * (len(SECONDS) + 1)
        self._samples = 0
        self._time = 0.0
        self._tokens = 0
        self._sample_seconds = 0.0
        self._pixel_steps = 0
        self._pace = Pace()

    def forward(self, samples: int, tokens: int, pixel_steps: int, seconds: float) -> None:
        """Count a forward pass; `tokens` are its image tokens over all rows."""
        with self._lock:
            self._sizes[_place(SIZES, samples)] += 1
            self._seconds[_place(SECONDS, seconds)] += 1
            self._samples += samples
            self._time += seconds
            self._tokens += tokens
            self._sample_seconds += samples * seconds
            self._pixel_steps += pixel_steps

    def added_to(self, report: WorkerReport) -> WorkerReport:
        """The report with the counts, and the pace since the last call.

        The report has `busy_seconds`, the total so far, and `in_flight`, the samples held now.
        """
        busy_seconds, held = report.busy_seconds or 0.0, report.in_flight or 0
        with self._lock:
            counts = busy_seconds, self._pixel_steps, self._sample_seconds
            self._pace.update(time.monotonic(), *counts, held)
            return replace(
                report,
                pixel_steps_per_second=self._pace.rate,
                samples_per_forward=self._pace.samples,
                tokens=self._tokens,
                forward_samples=_histogram(SIZES, self._sizes, self._samples),
                forward_seconds=_histogram(SECONDS, self._seconds, self._time),
            )


class StepRate:
    """A moving average of denoising steps per second; doesn't change while the worker is idle."""

    def __init__(self) -> None:
        self.value: float | None = None
        self._seen = (0.0, 0)

    def update(self, busy_seconds: float, steps: int) -> None:
        """Update with the totals so far: seconds with a pass running, and steps of all samples."""
        elapsed, new_steps = busy_seconds - self._seen[0], steps - self._seen[1]
        if new_steps > 0 and elapsed > 0:
            self.value = _smoothed(self.value, new_steps / elapsed)
            self._seen = (busy_seconds, steps)


class Pace:
    """Moving averages of the speed and of the samples at once, while there's enough work.

    Both are None before the first pass, and don't change while the worker is idle. The last few
    samples of a job, or a first one, still show how fast one sample is, but not how many fit at
    once, so they only count for the speed. If the denoiser ran for most of the time between two
    updates, the rest counts as work time too, because later images will stall the same way.
    """

    def __init__(self) -> None:
        self.samples: float | None = None
        self._each: float | None = None
        self._seen = (0.0, 0.0, 0.0, 0.0)

    @property
    def rate(self) -> float | None:
        """Pixel-steps per second with `samples` at once."""
        return None if self._each is None or self.samples is None else self._each * self.samples

    def update(
        self, now: float, busy_seconds: float, pixel_steps: float, sample_seconds: float, held: int
    ) -> None:
        """Update with the counts so far: seconds with a pass running, and the work done in them."""
        counts = (now, busy_seconds, pixel_steps, sample_seconds)
        passed, busy, work, occupied = (a - b for a, b in zip(counts, self._seen, strict=True))
        self._seen = counts
        if busy <= 0 or work <= 0:
            return
        samples = occupied / busy
        elapsed = passed if busy > passed / 2 else busy
        self._each = _smoothed(self._each, work / elapsed / samples)
        if self.samples is None or samples > self.samples or held > CROWDED * samples:
            self.samples = _smoothed(self.samples, samples)


def _smoothed(before: float | None, now: float) -> float:
    return now if before is None else before + SMOOTHING * (now - before)


def device_memory(device: str) -> dict[str, int]:
    """Bytes of an accelerator's memory: `allocated` now, `peak` since the start, and `total`.

    Empty if the device doesn't report them.
    """
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return {}
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "peak": torch.cuda.max_memory_allocated(device),
        "total": torch.cuda.get_device_properties(device).total_memory,
    }


def cache_counts(pipeline: object) -> dict[str, int]:
    """Hits and misses of the pipeline's prompt cache; empty if it has none."""
    cache = getattr(pipeline, "cache", None)
    if cache is None:
        return {}
    return {"hits": cache.hits, "misses": cache.misses}


def _place(bounds: tuple[float, ...], value: float) -> int:
    return next((place for place, bound in enumerate(bounds) if value <= bound), len(bounds))


def _histogram(bounds: tuple[float, ...], counts: list[int], total: float) -> Histogram:
    cumulative = accumulate(counts)
    return Histogram(tuple(zip((*bounds, None), cumulative, strict=True)), total)
