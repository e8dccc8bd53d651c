"""Helpers of the pipeline tests: requests, catalog entries, a loop like the worker engine's."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from jobs.catalog import Model
from jobs.request import ImageRequest
from pipelines.seam import Pipeline, Sample

PLAIN = ImageRequest("tiny", "a red cat", 1, 64, 64, 4, 3.5)


def ask(prompt: str = "a red cat", **fields: Any) -> ImageRequest:
    """A request for 64x64 pixels in 4 steps unless `fields` say otherwise."""
    return replace(PLAIN, prompt=prompt, **fields)


def entry(path: Path | str, **fields: Any) -> Model:
    """A catalog entry of a local fp32 replica."""
    return Model(**{"name": "tiny", "path": str(path), "local": True, "dtype": "float32", **fields})


def begin(pipeline: Pipeline, request: ImageRequest) -> Sample:
    """Encode and start one request."""
    [conditioning] = pipeline.encode([request])
    return pipeline.start(request, conditioning)


def serve(
    pipeline: Pipeline,
    arrivals: Mapping[int, Sequence[ImageRequest]],
    largest: int = 3,
    bucket: int = 0,
) -> tuple[dict[int, torch.Tensor], int]:
    """Serve requests that arrive at the given ticks, up to `largest` at a time, one step per tick.

    In each tick, the oldest samples with the same batch key advance together. Returns the pictures
    by seed, and the number of forward passes.
    """
    waiting: list[ImageRequest] = []
    running: list[Sample] = []
    pictures: dict[int, torch.Tensor] = {}
    tick = forwards = 0
    while waiting or running or any(at >= tick for at in arrivals):
        waiting += arrivals.get(tick, [])
        while waiting and len(running) < largest:
            running.append(begin(pipeline, waiting.pop(0)))
        if running:
            key = pipeline.batch_key(running[0].request)
            batch = [s for s in running if pipeline.batch_key(s.request) == key]
            pipeline.step(batch, bucket)
            forwards += 1
        for sample in [s for s in running if s.done]:
            running.remove(sample)
            [pictures[sample.request.seed]] = pipeline.decode([sample])
        tick += 1
    return pictures, forwards


def alone(pipeline: Pipeline, request: ImageRequest, bucket: int = 0) -> torch.Tensor:
    """The picture of a request that's served alone."""
    pictures, _ = serve(pipeline, {0: [request]}, bucket=bucket)
    return pictures[request.seed]


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest absolute difference of two pictures of the same shape."""
    assert one.shape == other.shape
    return (one - other).abs().max().item()
