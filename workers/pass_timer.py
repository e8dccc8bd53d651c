"""Times forward passes for the warm-up, along the path that requests take."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import structlog
import torch

from jobs.catalog import Model
from jobs.errors import GroupLost, ImageFailed
from jobs.request import ImageRequest
from pipelines.seam import Conditioning, Pipeline
from workers.costs import Stopwatch
from workers.scheduler import BUCKETS
from workers.trials import Trials

log = structlog.get_logger(__name__)

ROUNDS, MOST_ROUNDS, ROUNDS_SECONDS = 3, 12, 0.25
"""Timed forward passes per bucket: at least `ROUNDS`, then more up to `MOST_ROUNDS` or
`ROUNDS_SECONDS` in all. The fastest counts, because noise only makes passes slower."""


def probe(model: Model) -> ImageRequest:
    """The request that warm-up runs: the entry's defaults, so the size most users ask for."""
    d = model.defaults
    return ImageRequest(
        model=model.name,
        prompt="warm-up",
        seed=0,
        width=d.width,
        height=d.height,
        steps=min(d.steps, 4),  # some models can't do more than the entry says
        guidance_scale=d.guidance_scale,
    )


def tokens_of(pipeline: Pipeline, request: ImageRequest) -> int:
    """Rows x tokens of a request's forward pass."""
    return pipeline.rows(request) * pipeline.tokens(request)


@dataclass(frozen=True, slots=True)
class PassTimer:
    """Times forward passes of one pipeline."""

    pipeline: Pipeline
    device: str | None
    trials: Trials | None
    on_cpu: bool

    def in_turn(
        self, request: ImageRequest, buckets: Sequence[int], rounds: int, limit: float = math.inf
    ) -> dict[int, float]:
        """The fastest pass of each bucket, timed in turn so that a busy spell slows all alike.

        Each bucket runs at most `rounds` times, and no pass is started after `limit` seconds.
        """
        fastest: dict[int, float] = {}
        began = time.perf_counter()
        for _ in range(rounds):
            for bucket in buckets:
                if bucket > BUCKETS[-1] or time.perf_counter() - began > limit:
                    continue
                if (seconds := self.seconds(request, bucket, rounds=1)) is not None:
                    fastest[bucket] = min(seconds, fastest.get(bucket, seconds))
        return fastest

    def seconds(
        self, request: ImageRequest, bucket: int, rounds: int = MOST_ROUNDS
    ) -> float | None:
        """The fastest of a few forward passes; None if they fail: requests will report why."""
        if self.trials is None:
            return self._tried(request, bucket, rounds)
        # A pass may kill the process, which only the marker that `trying` leaves can report.
        if self.trials.is_deadly(request, bucket):
            return None
        with self.trials.trying(request, bucket):
            return self._tried(request, bucket, rounds)

    def _tried(self, request: ImageRequest, bucket: int, rounds: int) -> float | None:
        try:
            [conditioning] = self.pipeline.encode([request])
            return self._time(request, conditioning, bucket, rounds)
        except (torch.AcceleratorError, GroupLost):
            raise
        except Exception as error:
            size = f"{request.width}x{request.height}"
            log.info("warm-up: batch size failed", bucket=bucket, size=size, reason=str(error))
            return None

    def _time(
        self, request: ImageRequest, conditioning: Conditioning, bucket: int, rounds: int
    ) -> float:
        passes = 1 if self.pipeline.card.joins else request.steps
        times: list[float] = []
        least = min(ROUNDS, rounds)
        while len(times) < least or (len(times) < rounds and sum(times) < ROUNDS_SECONDS):
            samples = [self.pipeline.start(request, conditioning) for _ in range(bucket)]
            synchronise(self.device)
            stopwatch = Stopwatch(on_cpu=self.on_cpu)
            self.pipeline.step(samples, bucket)
            synchronise(self.device)
            times.append(stopwatch.seconds())
            if samples[0].error:
                raise ImageFailed(samples[0].error)
        return min(times) / passes


def synchronise(device: str | None) -> None:
    if device != "cpu" and torch.accelerator.is_available():
        torch.accelerator.synchronize(device)
