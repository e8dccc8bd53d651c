"""What a forward pass costs on this device: measured once at warm-up, kept on disk.

Warm-up takes the path that requests take (encode, start, step, decode), at the model's default
size, for growing buckets, and stops where a larger one no longer pays. The result decides the
pinned bucket of reproducible images, so it is kept: the same deployment keeps making the same
bits. Knows no queue.
"""

import hashlib
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import structlog
import torch

from jobs.catalog import Model
from jobs.errors import OutOfMemory
from jobs.request import ImageRequest
from pipelines.seam import Conditioning, Pipeline
from workers.scheduler import BUCKETS, WORTHWHILE, Costs

log = structlog.get_logger(__name__)

ROUNDS, MOST_ROUNDS, ROUNDS_SECONDS = 3, 12, 0.25
"""Timed forward passes a bucket: the first number, and on until so many or so many seconds of
them; the fastest counts, since noise only adds."""

LONGEST_SECONDS = 5.0
"""A bucket whose forward pass takes longer is the last one measured."""

_DEGREES = ("ring", "ulysses", "cfg", "tensor", "stages", "chunks")


def warm_up(pipeline: Pipeline, model: Model, device: str, data: Path) -> Costs:
    """Run the path that requests take; the costs from disk, or measured now and written there."""
    request = probe(model)
    _once(pipeline, request)
    path = data / "profiles" / f"{_fingerprint(pipeline, model, device)}.json"
    if path.exists():
        points = json.loads(path.read_text())["points"]
        return Costs(tuple((int(tokens), float(seconds)) for tokens, seconds in points))
    costs = measure(pipeline, request)
    _keep(path, model, device, costs)
    return costs


def probe(model: Model) -> ImageRequest:
    """The request that warm-up runs: the entry's defaults, so the sizes that users take."""
    d = model.defaults
    return ImageRequest(
        model=model.name,
        prompt="warm-up",
        seed=0,
        width=d.width,
        height=d.height,
        steps=max(2, min(4, model.limits.max_steps)),
        guidance_scale=d.guidance_scale,
    )


def measure(pipeline: Pipeline, request: ImageRequest) -> Costs:
    """Seconds of a forward pass for growing buckets of `request`, until one no longer pays."""
    tokens = pipeline.rows(request) * pipeline.tokens(request)
    [conditioning] = pipeline.encode([request])
    points: list[tuple[int, float]] = []
    best_rate = 0.0
    for bucket in BUCKETS:
        least = bucket / best_rate if best_rate else float("inf")
        try:
            seconds = _time(pipeline, request, conditioning, bucket)
            if seconds * WORTHWHILE > least:  # a busy moment has not the last word
                seconds = min(seconds, _time(pipeline, request, conditioning, bucket))
        except OutOfMemory:
            log.info("warm-up: bucket does not fit", bucket=bucket)
            break
        points.append((bucket * tokens, seconds))
        if seconds * WORTHWHILE > least or seconds > LONGEST_SECONDS:
            break
        best_rate = max(best_rate, bucket / seconds)
    return Costs(tuple(points))


def _time(
    pipeline: Pipeline, request: ImageRequest, conditioning: Conditioning, bucket: int
) -> float:
    passes = 1 if pipeline.card.joins else request.steps
    times: list[float] = []
    while len(times) < ROUNDS or (len(times) < MOST_ROUNDS and sum(times) < ROUNDS_SECONDS):
        samples = [pipeline.start(request, conditioning) for _ in range(bucket)]
        _synchronise()
        started = time.perf_counter()
        pipeline.step(samples, bucket)
        _synchronise()
        times.append(time.perf_counter() - started)
    return min(times) / passes


def _once(pipeline: Pipeline, request: ImageRequest) -> None:
    [conditioning] = pipeline.encode([request])
    sample = pipeline.start(replace(request), conditioning)
    while not sample.done:
        pipeline.step([sample], 1)
    pipeline.decode([sample])


def _synchronise() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _fingerprint(pipeline: Pipeline, model: Model, device: str) -> str:
    """Names the measurement: model, device, precision, and the shape that was measured."""
    request = probe(model)
    parts = (
        model.path,
        str(model.revision),
        model.dtype,
        model.placement,
        _device_name(device),
        str(torch.get_num_threads()),
        str(pipeline.tokens(request) * pipeline.rows(request)),
        *(f"{part}={getattr(model, part)}" for part in _DEGREES if getattr(model, part) != 1),
    )
    return f"{model.name}-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:12]}"


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def _keep(path: Path, model: Model, device: str, costs: Costs) -> None:
    """Write once: a worker that measured at the same time keeps its own until it restarts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    described = {"model": model.name, "device": _device_name(device), "points": costs.points}
    partial.write_text(json.dumps(described, indent=1) + "\n")
    partial.replace(path)
