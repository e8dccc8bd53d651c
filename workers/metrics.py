"""What a worker's forward passes came to, counted for whoever watches: sizes, seconds, tokens.

Counts only rise, from the worker's start; they travel in its registration, as everything that is
known of it. Histograms are in Prometheus' way: how many were at most so large. Knows no queue.
"""

import threading
import time
from typing import Any

import torch

SIZES = (1, 2, 4, 8, 16, 32)
"""Upper bounds of the forward batch's histogram, in samples."""

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
"""Upper bounds of the forward pass's histogram."""


SMOOTHING = 0.3
"""Weight of the newest beat in the moving averages."""


CROWDED = 1.2
"""A worker that holds so many times what it runs has enough to run."""


class Measures:
    """The counts of one worker; for any thread."""

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
        """Count a forward pass of so many samples and image tokens, rows counted."""
        with self._lock:
            self._sizes[_place(SIZES, samples)] += 1
            self._seconds[_place(SECONDS, seconds)] += 1
            self._samples += samples
            self._time += seconds
            self._tokens += tokens
            self._sample_seconds += samples * seconds
            self._pixel_steps += pixel_steps

    def describe(self, busy_seconds: float, held: int = 0) -> dict[str, Any]:
        """The counts, as JSON, and the pace since the last time.

        `busy_seconds` in all; `held` is how many samples the worker holds now.
        """
        with self._lock:
            counts = busy_seconds, self._pixel_steps, self._sample_seconds
            self._pace.take(time.monotonic(), *counts, held)
            return {
                "pixel_steps_per_second": self._pace.rate,
                "samples_per_forward": self._pace.samples,
                "tokens": self._tokens,
                "forward_samples": _histogram(SIZES, self._sizes, self._samples),
                "forward_seconds": _histogram(SECONDS, self._seconds, self._time),
            }


class Pace:
    """How fast, and how many samples at once, while there is enough to denoise: averages.

    Both are as they were while there is less; None before there was anything. A sample alone gets
    its steps as a sample among others does, so a job's last few, or a first one, say how fast one
    is and not how many would go. Between two looks the denoiser is taken to have had work all the
    time if it ran for most of it: what it then stood still, it waited for others, and so will what
    comes.
    """

    def __init__(self) -> None:
        self.samples: float | None = None
        self._each: float | None = None
        self._seen = (0.0, 0.0, 0.0, 0.0)

    @property
    def rate(self) -> float | None:
        """Pixel-steps per second of so many samples at once."""
        return None if self._each is None or self.samples is None else self._each * self.samples

    def take(
        self, now: float, busy_seconds: float, pixel_steps: float, sample_seconds: float, held: int
    ) -> None:
        """Counts by now: seconds with a forward pass running, and what came of them."""
        counts = (now, busy_seconds, pixel_steps, sample_seconds)
        passed, busy, made, occupied = (a - b for a, b in zip(counts, self._seen, strict=True))
        self._seen = counts
        if busy <= 0 or made <= 0:
            return
        samples = occupied / busy
        elapsed = passed if busy > passed / 2 else busy
        self._each = _smoothed(self._each, made / elapsed / samples)
        if self.samples is None or samples > self.samples or held > CROWDED * samples:
            self.samples = _smoothed(self.samples, samples)


def _smoothed(before: float | None, now: float) -> float:
    return now if before is None else before + SMOOTHING * (now - before)


def device_memory(device: str) -> dict[str, int]:
    """Bytes of an accelerator: `allocated` now, `peak` since the start, and its `total`.

    Empty where the device counts none.
    """
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return {}
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "peak": torch.cuda.max_memory_allocated(device),
        "total": torch.cuda.get_device_properties(device).total_memory,
    }


def cache_counts(pipeline: object) -> dict[str, int]:
    """How often a prompt was found encoded, and how often not; empty without such a cache."""
    cache = getattr(pipeline, "cache", None)
    if cache is None:
        return {}
    return {"hits": cache.hits, "misses": cache.misses}


def _place(bounds: tuple[float, ...], value: float) -> int:
    return next((place for place, bound in enumerate(bounds) if value <= bound), len(bounds))


def _histogram(bounds: tuple[float, ...], counts: list[int], total: float) -> dict[str, Any]:
    """Pairs of bound and how many were at most that; None is the bound of all."""
    pairs, so_far = [], 0
    for bound, count in zip((*bounds, None), counts, strict=True):
        so_far += count
        pairs.append([bound, so_far])
    return {"buckets": pairs, "sum": total}
