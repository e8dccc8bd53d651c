"""What a forward pass costs on this device: measured at the first start, kept on disk.

Warm-up takes the path that requests take (encode, start, step, decode), at the model's default
size, for growing buckets, and stops where a larger one no longer pays; and one sample at smaller
sizes, since they cost less than that. The result decides the pinned bucket of reproducible images,
so it is kept: the same deployment keeps making the same bits. Only where two starts in a row find
that bucket clearly wrong is it measured anew. On the CPU, time during which other programs had the
processor is left out, so that a busy machine comes to the same result as a quiet one. At every
start the sizes and buckets that requests will take are run once, because a first run of each is
slow. What real work then teaches (`workers/costs.py`) is kept next to it. Knows no queue.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog
import torch

from jobs.catalog import Model
from jobs.errors import GroupLost, ImageFailed, ModelUnavailable, OutOfMemory
from jobs.request import ImageRequest
from pipelines.seam import Conditioning, Pipeline
from workers.costs import Keeper, Learner, Stopwatch, read_learned
from workers.scheduler import BUCKETS, PINNED_SLOWDOWN, WORTH_WAITING, WORTHWHILE, Costs
from workers.trials import Trials

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

TURNS, TURNS_SECONDS = 4, 5.0
"""Further rounds over all buckets in turn, and the seconds after which there are no more."""

CLEARLY, DOUBTS = 1.25, 2
"""At a start, a pinned bucket that's off its limit by this factor is doubted; after so many starts
in a row it's pinned anew."""

_DEGREES = ("ring", "ulysses", "cfg", "tensor", "stages", "chunks")
_SPEEDS = (
    *("compile", "cuda_graphs", "quantization", "attention_backend", "cache"),
    *("config", "components"),
)


def warm_up(pipeline: Pipeline, model: Model, device: str, data: Path) -> Costs:
    """Run the path that requests take; the costs from disk, or measured now and written there.

    Together with what earlier workers learned from real work.
    """
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
    path = _profile_file(pipeline, model, device, data)
    trials = Trials(path)
    timer = _Timer(pipeline, device, trials, computes_here(model, device))
    if not pipeline.card.joins:  # a pipeline that is called whole may turn sizes into others
        for one in _smaller(pipeline, model)[:1]:
            timer.seconds(one, 1, rounds=1)
    if path.exists():
        _look_again(path, model, device, timer, request)
    else:
        smaller = _smaller(pipeline, model)
        costs = measure(pipeline, request, smaller, device, trials, timer.on_cpu)
        _keep(path, model, device, costs)
    costs = replace(_read(path), exact=read_learned(_learned_file(path)))
    _rehearse(model, costs, timer)
    return costs


def keeper(pipeline: Pipeline, model: Model, device: str, data: Path, costs: Costs) -> Keeper:
    """What learns costs from real work, and keeps them next to the profile.

    Under a feature cache nothing is learned, because passes differ in what they skip.
    """
    learner = Learner(
        costs,
        usual_tokens(pipeline, model),
        on_cpu=computes_here(model, device),
        learns=model.cache is None,
    )
    return Keeper(learner, _learned_file(_profile_file(pipeline, model, device, data)))


def usual_tokens(pipeline: Pipeline, model: Model) -> int:
    """Tokens of a request of the model's default size, all rows."""
    return _tokens(pipeline, probe(model))


def _learned_file(path: Path) -> Path:
    return path.with_name(f"{path.stem}.learned.json")


def computes_here(model: Model, device: str) -> bool:
    """Whether the thread that runs a forward pass is the one that computes it."""
    return device == "cpu" and model.ranks == 1


def _profile_file(pipeline: Pipeline, model: Model, device: str, data: Path) -> Path:
    return data / "profiles" / f"{_fingerprint(pipeline, model, device)}.json"


def _look_again(
    path: Path, model: Model, device: str, timer: "_Timer", request: ImageRequest
) -> None:
    """Pin anew where two starts in a row clearly contradict the profile.

    The pinned bucket decides the bits of reproducible images, so one busy moment must not move it.
    """
    before = _read(path)
    tokens = _tokens(timer.pipeline, request)
    pinned = before.pinned(tokens)
    if not is_contradicted(pinned, timer.in_turn(request, (1, pinned, 2 * pinned), ROUNDS)):
        _note_doubts(path, 0)
    elif _doubts(path) + 1 < DOUBTS:
        log.warning("warm-up: the pinned batch size doesn't fit what it costs now", pinned=pinned)
        _note_doubts(path, _doubts(path) + 1)
    else:
        smaller = _smaller(timer.pipeline, model)
        after = measure(timer.pipeline, request, smaller, device, timer.trials, timer.on_cpu)
        _write(path, _described(model, device, after))
        log.warning(
            "warm-up: pinned anew, reproducible images may get other bits than before",
            before=pinned,
            after=after.pinned(tokens),
        )


def is_contradicted(pinned: int, seconds: Mapping[int, float]) -> bool:
    """Whether these seconds, by bucket, clearly speak against this pinned bucket."""
    alone, own, double = (seconds.get(bucket) for bucket in (1, pinned, 2 * pinned))
    if alone is None or own is None:
        return False
    is_too_large = own > CLEARLY * PINNED_SLOWDOWN * alone
    return is_too_large or (double is not None and double * CLEARLY < PINNED_SLOWDOWN * alone)


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
    on_cpu: bool | None = None,
) -> Costs:
    """Seconds of a forward pass for growing buckets of `request`, until one no longer pays.

    And of one sample for each of the `smaller` requests. The `device` None is torch's current one.
    `on_cpu` tells that a pass computes on this thread, None that it does if the device is the CPU.
    """
    if on_cpu is None:
        on_cpu = device == "cpu" or (device is None and not torch.accelerator.is_available())
    timer = _Timer(pipeline, device, trials, on_cpu)
    tokens = _tokens(pipeline, request)
    points = {}
    for one in smaller:
        if (seconds := timer.seconds(one, 1)) is not None:
            points[_tokens(pipeline, one)] = seconds
    best_rate, poorer = 0.0, 0
    buckets = []
    for bucket in BUCKETS:
        seconds = timer.seconds(request, bucket)
        if seconds is None:
            break
        buckets.append(bucket)
        points[bucket * tokens] = seconds
        poorer = poorer + 1 if seconds * WORTHWHILE * best_rate > bucket else 0
        if poorer == CONVINCING or seconds > LONGEST_SECONDS:
            break
        best_rate = max(best_rate, bucket / seconds)
    for bucket, seconds in timer.in_turn(request, buckets, TURNS, TURNS_SECONDS).items():
        points[bucket * tokens] = min(points[bucket * tokens], seconds)
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


def _rehearse(model: Model, costs: Costs, timer: "_Timer") -> None:
    """Run each size that is listed, and the default, once in each bucket that it will take."""
    usual = probe(model)
    sizes = {(usual.width, usual.height), *model.limits.sizes}
    for request in [replace(usual, width=width, height=height) for width, height in sorted(sizes)]:
        tokens = _tokens(timer.pipeline, request)
        knees = {costs.largest(tokens), costs.largest(tokens, WORTH_WAITING)}
        for bucket in sorted({1, costs.pinned(tokens), *knees}):
            timer.seconds(request, bucket, rounds=1)


@dataclass(frozen=True, slots=True)
class _Timer:
    """Times forward passes of one pipeline."""

    pipeline: Pipeline
    device: str | None
    trials: Trials | None
    on_cpu: bool

    def in_turn(
        self, request: ImageRequest, buckets: Sequence[int], rounds: int, limit: float = math.inf
    ) -> dict[int, float]:
        """The fastest pass of each bucket, timed in turn, so that a busy spell hits all alike.

        At most `rounds` times each, and no further round after `limit` seconds.
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
        """The fastest of a few forward passes; None where the pipeline can't, such as for memory.

        A pipeline that refuses even one sample is for the requests to find out, which say so.
        """
        if self.trials is None:
            return self._tried(request, bucket, rounds)
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
            log.info("warm-up: not possible", bucket=bucket, size=size, reason=str(error))
            return None

    def _time(
        self, request: ImageRequest, conditioning: Conditioning, bucket: int, rounds: int
    ) -> float:
        passes = 1 if self.pipeline.card.joins else request.steps
        times: list[float] = []
        least = min(ROUNDS, rounds)
        while len(times) < least or (len(times) < rounds and sum(times) < ROUNDS_SECONDS):
            samples = [self.pipeline.start(request, conditioning) for _ in range(bucket)]
            _synchronise(self.device)
            stopwatch = Stopwatch(on_cpu=self.on_cpu)
            self.pipeline.step(samples, bucket)
            _synchronise(self.device)
            times.append(stopwatch.seconds())
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


def _described(model: Model, device: str, costs: Costs) -> dict[str, Any]:
    return {"model": model.name, "device": _device_name(device), "points": costs.points}


def _keep(path: Path, model: Model, device: str, costs: Costs) -> None:
    """Write it, unless a worker that measured at the same time was first: both then go by that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path, _described(model, device, costs))
    with suppress(FileExistsError):
        os.link(partial, path)
    partial.unlink()


def _write(path: Path, described: Mapping[str, Any]) -> None:
    _partial(path, described).replace(path)


def _partial(path: Path, described: Mapping[str, Any]) -> Path:
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(described, indent=1) + "\n")
    return partial


def _doubts(path: Path) -> int:
    """How many starts in a row have contradicted the profile."""
    return int(json.loads(path.read_text()).get("doubts", 0))


def _note_doubts(path: Path, doubts: int) -> None:
    """Keep the number; a disk that refuses costs nothing but this."""
    if doubts == _doubts(path):
        return
    try:
        _write(path, {**json.loads(path.read_text()), "doubts": doubts})
    except OSError as error:
        log.warning("warm-up: no note can be kept", note=str(path), reason=str(error))


def _read(path: Path) -> Costs:
    described = json.loads(path.read_text())["points"]
    points = tuple((int(tokens), float(seconds)) for tokens, seconds in described)
    return Costs(points, pinning=points)
