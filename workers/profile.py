"""What a forward pass costs on this device: measured once at warm-up, kept on disk.

Warm-up takes the path that requests take (encode, start, step, decode), at the model's default
size, for growing buckets, and stops where a larger one no longer pays; and one sample at smaller
sizes, since they cost less than that. The result decides the pinned bucket of reproducible images,
so it is kept: the same deployment keeps making the same bits. At every start the sizes and buckets
that requests will take are run once, so that nobody waits for what is made at a first time. What a
worker does not survive is noted beside the profile, and left out by later ones. Knows no queue.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import structlog
import torch

from jobs.catalog import Model
from jobs.errors import GroupLost, ImageFailed, ModelUnavailable, OutOfMemory
from jobs.request import ImageRequest
from pipelines.seam import Conditioning, Pipeline
from workers.scheduler import BUCKETS, WORTH_WAITING, WORTHWHILE, Costs

log = structlog.get_logger(__name__)

ROUNDS, MOST_ROUNDS, ROUNDS_SECONDS = 3, 12, 0.25
"""Timed forward passes a bucket: the first number, and on until so many or so many seconds of
them; the fastest counts, since noise only adds."""

LONGEST_SECONDS = 5.0
"""A bucket whose forward pass takes longer is the last one measured."""

SMALLER = (4, 2)
"""Where any size may be asked for, these parts of the default's sides are measured too."""

CONVINCING = 2
"""Buckets, one after the other, that must pay less than a smaller one before growing ends: a busy
moment has not the last word."""

DEADLY = 2
"""So many workers that ended in the same trial are its fault: it is not run again."""

_DEGREES = ("ring", "ulysses", "cfg", "tensor", "stages", "chunks")
_SPEEDS = (
    *("compile", "cuda_graphs", "quantization", "attention_backend", "cache"),
    *("config", "components"),
)


class Trials:
    """Notes of what is run at warm-up, each kept while it runs: what is left of one is a death.

    In a group, what does not fit a device ends the group and its processes, and every later start
    would try it again. A worker may also be killed for another reason while it tries, or beside
    one that tries the same: so it takes more than one death, counted from start to start, and a
    success removes the note. A note may cost a bucket, never an image.
    """

    def __init__(self, profile: Path) -> None:
        self._profile = profile
        notes = profile.parent.glob(f"{profile.stem}.*.trial")
        self._deaths = {note.name: _count(note) for note in notes}

    def is_deadly(self, request: ImageRequest, bucket: int) -> bool:
        """Whether workers keep ending in it; said to the log."""
        note = self._note(request, bucket)
        if self._deaths.get(note.name, 0) < DEADLY:
            return False
        log.warning(
            "warm-up: left out, as workers ended in it; remove the note to try again",
            bucket=bucket,
            size=f"{request.width}x{request.height}",
            note=str(note),
        )
        return True

    @contextmanager
    def trying(self, request: ImageRequest, bucket: int) -> Iterator[None]:
        """Keep a note while it runs; an error that ends the worker leaves it there.

        Where there is no room for a note, it runs without one.
        """
        note = self._note(request, bucket)
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(str(self._deaths.get(note.name, 0) + 1))
        except OSError as error:
            log.warning("warm-up: no note can be kept", note=str(note), reason=str(error))
        yield
        note.unlink(missing_ok=True)

    def _note(self, request: ImageRequest, bucket: int) -> Path:
        trial = f"{request.width}x{request.height}x{bucket}"
        return self._profile.with_name(f"{self._profile.stem}.{trial}.trial")


def _count(note: Path) -> int:
    """Deaths that a note tells of; none if it is gone again or just being written."""
    try:
        return int(note.read_text() or 0)
    except (OSError, ValueError):
        return 0


def warm_up(pipeline: Pipeline, model: Model, device: str, data: Path) -> Costs:
    """Run the path that requests take; the costs from disk, or measured now and written there."""
    request = probe(model)
    try:
        _once(pipeline, request)
    except (torch.AcceleratorError, GroupLost, OutOfMemory, ModelUnavailable):
        raise
    except Exception:
        if pipeline.card.joins or request.steps == model.defaults.steps:
            raise
        request = replace(request, steps=model.defaults.steps)  # it may make no fewer
        _once(pipeline, request)
    path = data / "profiles" / f"{_fingerprint(pipeline, model, device)}.json"
    trials = Trials(path)
    if not pipeline.card.joins:  # a pipeline that is called whole may turn sizes into others
        for one in _smaller(pipeline, model)[:1]:
            _seconds(pipeline, one, 1, device, trials, rounds=1)
    if not path.exists():
        smaller = _smaller(pipeline, model)
        _keep(path, model, device, measure(pipeline, request, smaller, device, trials))
    costs = _read(path)
    _rehearse(pipeline, model, costs, device, trials)
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
        steps=min(d.steps, 4),  # some models can't make more than the entry says
        guidance_scale=d.guidance_scale,
    )


def measure(
    pipeline: Pipeline,
    request: ImageRequest,
    smaller: Iterable[ImageRequest] = (),
    device: str | None = None,
    trials: Trials | None = None,
) -> Costs:
    """Seconds of a forward pass for growing buckets of `request`, until one no longer pays.

    And of one sample for each of the `smaller` requests. The `device` None is torch's current one.
    """
    tokens = _tokens(pipeline, request)
    points = {}
    for one in smaller:
        if (seconds := _seconds(pipeline, one, 1, device, trials)) is not None:
            points[_tokens(pipeline, one)] = seconds
    best_rate, poorer = 0.0, 0
    for bucket in BUCKETS:
        seconds = _seconds(pipeline, request, bucket, device, trials)
        if seconds is None:
            break
        points[bucket * tokens] = seconds
        poorer = poorer + 1 if seconds * WORTHWHILE * best_rate > bucket else 0
        if poorer == CONVINCING or seconds > LONGEST_SECONDS:
            break
        best_rate = max(best_rate, bucket / seconds)
    return Costs(_without_bumps(sorted(points.items())))


def _without_bumps(points: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Points that never fall: what took longer than more tokens did was a busy moment."""
    return tuple((tokens, min(s for _, s in points[at:])) for at, (tokens, _) in enumerate(points))


def _smaller(pipeline: Pipeline, model: Model) -> list[ImageRequest]:
    """Requests of sizes below the default's."""
    usual, grid = probe(model), pipeline.card.multiple
    sizes = model.limits.sizes or [
        (
            max(grid, usual.width // part // grid * grid),
            max(grid, usual.height // part // grid * grid),
        )
        for part in SMALLER
    ]
    found = [replace(usual, width=width, height=height) for width, height in sizes]
    return [one for one in found if one.pixels < usual.pixels]


def _rehearse(pipeline: Pipeline, model: Model, costs: Costs, device: str, trials: Trials) -> None:
    """Run each size that is listed, and the default, once in each bucket that it will take."""
    usual = probe(model)
    sizes = {(usual.width, usual.height), *model.limits.sizes}
    for request in [replace(usual, width=width, height=height) for width, height in sorted(sizes)]:
        tokens = _tokens(pipeline, request)
        knees = {costs.largest(tokens), costs.largest(tokens, WORTH_WAITING)}
        for bucket in sorted({1, costs.pinned(tokens), *knees}):
            _seconds(pipeline, request, bucket, device, trials, rounds=1)


def _seconds(
    pipeline: Pipeline,
    request: ImageRequest,
    bucket: int,
    device: str | None,
    trials: Trials | None,
    rounds: int = MOST_ROUNDS,
) -> float | None:
    """The fastest of a few forward passes; None where the pipeline cannot, such as for memory.

    A pipeline that refuses even one sample is for the requests to find out, which say so.
    """
    if trials is None:
        return _tried(pipeline, request, bucket, device, rounds)
    if trials.is_deadly(request, bucket):
        return None
    with trials.trying(request, bucket):
        return _tried(pipeline, request, bucket, device, rounds)


def _tried(
    pipeline: Pipeline, request: ImageRequest, bucket: int, device: str | None, rounds: int
) -> float | None:
    try:
        [conditioning] = pipeline.encode([request])
        return _time(pipeline, request, conditioning, bucket, device, rounds)
    except (torch.AcceleratorError, GroupLost):
        raise
    except Exception as error:
        size = f"{request.width}x{request.height}"
        log.info("warm-up: not possible", bucket=bucket, size=size, reason=str(error))
        return None


def _time(
    pipeline: Pipeline,
    request: ImageRequest,
    conditioning: Conditioning,
    bucket: int,
    device: str | None,
    rounds: int,
) -> float:
    passes = 1 if pipeline.card.joins else request.steps
    times: list[float] = []
    least = min(ROUNDS, rounds)
    while len(times) < least or (len(times) < rounds and sum(times) < ROUNDS_SECONDS):
        samples = [pipeline.start(request, conditioning) for _ in range(bucket)]
        _synchronise(device)
        started = time.perf_counter()
        pipeline.step(samples, bucket)
        _synchronise(device)
        times.append(time.perf_counter() - started)
        if samples[0].error:
            raise ImageFailed(samples[0].error)
    return min(times) / passes


def _tokens(pipeline: Pipeline, request: ImageRequest) -> int:
    return pipeline.rows(request) * pipeline.tokens(request)


def _once(pipeline: Pipeline, request: ImageRequest) -> None:
    [conditioning] = pipeline.encode([request])
    sample = pipeline.start(replace(request), conditioning)
    while not sample.done:
        pipeline.step([sample], 1)
        if sample.error:
            raise ModelUnavailable(f"model {request.model!r}: its defaults fail: {sample.error}")
    pipeline.decode([sample])


def _synchronise(device: str | None) -> None:
    """Wait for what the device was given to do."""
    if device != "cpu" and torch.accelerator.is_available():
        torch.accelerator.synchronize(device)


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
        torch.__version__,
        str(_tokens(pipeline, request)),
        *(f"{part}={getattr(model, part)}" for part in _SPEEDS if getattr(model, part)),
        *(f"{part}={getattr(model, part)}" for part in _DEGREES if getattr(model, part) != 1),
    )
    return f"{model.name}-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:12]}"


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def _keep(path: Path, model: Model, device: str, costs: Costs) -> None:
    """Write it, unless a worker that measured at the same time was first: both then go by that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    described = {"model": model.name, "device": _device_name(device), "points": costs.points}
    partial.write_text(json.dumps(described, indent=1) + "\n")
    with suppress(FileExistsError):
        os.link(partial, path)
    partial.unlink()


def _read(path: Path) -> Costs:
    points = json.loads(path.read_text())["points"]
    return Costs(tuple((int(tokens), float(seconds)) for tokens, seconds in points))
