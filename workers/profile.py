"""What a forward pass costs on this device: measured at the first start, then kept on disk.

Warm-up takes the same path as requests (encode, start, step, decode). It measures growing buckets
at the model's default size until larger ones make no more images per second, and single samples at
smaller sizes. On the CPU, time taken by other programs isn't counted, so a busy machine gets the
same result as an idle one.

The result decides the pinned bucket of reproducible images, and with it their bits. So it's kept on
disk, and measured again only if two starts in a row find that the bucket is clearly wrong. Costs
that are measured during real work (`workers/costs.py`) are stored next to it.

Every start also runs each size and bucket that requests will use once, because the first run of
each is slow.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog
import torch

from jobs.catalog import Model
from jobs.errors import GroupLost, ModelUnavailable, OutOfMemory
from jobs.request import ImageRequest
from pipelines.seam import Pipeline
from workers.costs import Keeper, Learner, read_learned
from workers.pass_timer import ROUNDS, PassTimer, probe, tokens_of
from workers.rehearsal import rehearse
from workers.scheduler import BUCKETS, PINNED_SLOWDOWN, WORTHWHILE, Costs
from workers.trials import Trials

log = structlog.get_logger(__name__)

LONGEST_SECONDS = 5.0
"""No larger bucket is measured after one whose forward pass takes longer than this."""

SMALLER = (4, 2)
"""If any size is allowed, sizes with the default's sides divided by these are measured too."""

POORER_IN_A_ROW = 2
"""Measuring stops after this many buckets in a row with fewer images per second than a smaller one.
With 1, a single busy moment could stop it."""

TURNS, TURNS_SECONDS = 4, 5.0
"""Extra rounds over all buckets in turn, and the seconds after which none is started."""

TOLERANCE, DOUBTS = 1.25, 2
"""A start doubts the pinned bucket if it's off its limit by the factor `TOLERANCE`. After `DOUBTS`
such starts in a row, it's measured again."""

_DEGREES = ("ring", "ulysses", "cfg", "tensor", "stages", "chunks")
_SPEEDS = (
    *("compile", "cuda_graphs", "quantization", "attention_backend", "cache"),
    *("config", "components"),
)


def warm_up(pipeline: Pipeline, model: Model, device: str, data: Path) -> Costs:
    """Warm the pipeline up; return costs from disk, or measure them now and write them there.

    Includes what earlier workers learned from real work.
    """
    request = probe(model)
    try:
        _once(pipeline, request)
    except (torch.AcceleratorError, GroupLost, OutOfMemory, ModelUnavailable):
        raise
    except Exception:
        if pipeline.card.joins or request.steps == model.defaults.steps:
            raise
        request = replace(request, steps=model.defaults.steps)  # it may not support fewer
        _once(pipeline, request)
    path = _profile_file(pipeline, model, device, data)
    trials = Trials(path)
    timer = PassTimer(pipeline, device, trials, computes_here(model, device))
    if not pipeline.card.joins:
        # Such a pipeline may silently round sizes; running another size reveals that it does.
        for smaller_request in _smaller(pipeline, model)[:1]:
            timer.seconds(smaller_request, 1, rounds=1)
    if path.exists():
        _check_pinned(path, model, device, timer, request)
    else:
        smaller = _smaller(pipeline, model)
        costs = measure(pipeline, request, smaller, device, trials, timer.on_cpu)
        _keep(path, model, device, costs)
    # Read even what was just measured, because another worker's profile may have been written
    # first.
    costs = replace(_read(path), exact=read_learned(_learned_file(path)))
    return replace(costs, same_bits=rehearse(model, costs, timer))


def keeper(pipeline: Pipeline, model: Model, device: str, data: Path, costs: Costs) -> Keeper:
    """A `Keeper` that learns costs from real work and keeps them next to the profile.

    With a feature cache it learns nothing, because passes differ in what they skip.
    """
    learner = Learner(
        costs,
        usual_tokens(pipeline, model),
        on_cpu=computes_here(model, device),
        learns=model.cache is None,
    )
    return Keeper(learner, _learned_file(_profile_file(pipeline, model, device, data)))


def usual_tokens(pipeline: Pipeline, model: Model) -> int:
    """Rows x tokens of a request of the model's default size."""
    return tokens_of(pipeline, probe(model))


def _learned_file(path: Path) -> Path:
    return path.with_name(f"{path.stem}.learned.json")


def computes_here(model: Model, device: str) -> bool:
    """Whether the thread that calls a forward pass also computes it."""
    return device == "cpu" and model.ranks == 1


def _profile_file(pipeline: Pipeline, model: Model, device: str, data: Path) -> Path:
    return data / "profiles" / f"{_fingerprint(pipeline, model, device)}.json"


def _check_pinned(
    path: Path, model: Model, device: str, timer: PassTimer, request: ImageRequest
) -> None:
    """Measure again if two starts in a row clearly contradict the profile's pinned bucket.

    The pinned bucket decides the bits of reproducible images, so one busy moment must not move it.
    """
    # Three buckets are enough: the pinned one should cost at most PINNED_SLOWDOWN times a lone
    # sample, and the next one more than that. They're timed in turn, so that a busy moment affects
    # all of them and doesn't change their ratios.
    before = _read(path)
    tokens = tokens_of(timer.pipeline, request)
    pinned = before.pinned(tokens)
    if not is_contradicted(pinned, timer.in_turn(request, (1, pinned, 2 * pinned), ROUNDS)):
        _note_doubts(path, 0)
    elif _doubts(path) + 1 < DOUBTS:
        log.warning("warm-up: pinned batch size doesn't match its current cost", pinned=pinned)
        _note_doubts(path, _doubts(path) + 1)
    else:
        smaller = _smaller(timer.pipeline, model)
        after = measure(timer.pipeline, request, smaller, device, timer.trials, timer.on_cpu)
        _write(path, _described(model, device, after))
        log.warning(
            "warm-up: pinned batch size changed, reproducible images may get different bits",
            before=pinned,
            after=after.pinned(tokens),
        )


def is_contradicted(pinned: int, seconds: Mapping[int, float]) -> bool:
    """Whether these seconds by bucket clearly contradict the pinned bucket."""
    # TOLERANCE widens the limit in both directions, or a bucket near it would flip between starts.
    alone, own, double = (seconds.get(bucket) for bucket in (1, pinned, 2 * pinned))
    if alone is None or own is None:
        return False
    is_too_large = own > TOLERANCE * PINNED_SLOWDOWN * alone
    return is_too_large or (double is not None and double * TOLERANCE < PINNED_SLOWDOWN * alone)


def measure(
    pipeline: Pipeline,
    request: ImageRequest,
    smaller: Iterable[ImageRequest] = (),
    device: str | None = None,
    trials: Trials | None = None,
    on_cpu: bool | None = None,
) -> Costs:
    """Time a forward pass for growing buckets of `request`, until images per second stop rising.

    Also times one sample of each of the `smaller` requests. `device` defaults to torch's current
    one. `on_cpu` says whether passes compute on this thread; by default if the device is the CPU.
    """
    if on_cpu is None:
        on_cpu = device == "cpu" or (device is None and not torch.accelerator.is_available())
    timer = PassTimer(pipeline, device, trials, on_cpu)
    tokens = tokens_of(pipeline, request)
    points = {}
    for smaller_request in smaller:
        if (seconds := timer.seconds(smaller_request, 1)) is not None:
            points[tokens_of(pipeline, smaller_request)] = seconds
    best_rate, poorer = 0.0, 0
    buckets = []
    for bucket in BUCKETS:
        seconds = timer.seconds(request, bucket)
        if seconds is None:
            break
        buckets.append(bucket)
        points[bucket * tokens] = seconds
        poorer = poorer + 1 if seconds * WORTHWHILE * best_rate > bucket else 0
        if poorer == POORER_IN_A_ROW or seconds > LONGEST_SECONDS:
            break
        best_rate = max(best_rate, bucket / seconds)
    # A busy moment may have affected only some of the buckets above, so time them again in turn.
    for bucket, seconds in timer.in_turn(request, buckets, TURNS, TURNS_SECONDS).items():
        points[bucket * tokens] = min(points[bucket * tokens], seconds)
    return Costs(_without_bumps(sorted(points.items())))


def _without_bumps(points: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Make seconds ascend with tokens: a pass can't really take longer than one of more tokens."""
    return tuple((tokens, min(s for _, s in points[at:])) for at, (tokens, _) in enumerate(points))


def _smaller(pipeline: Pipeline, model: Model) -> list[ImageRequest]:
    usual, grid = probe(model), pipeline.card.multiple
    sizes = model.limits.sizes or [
        (
            max(grid, usual.width // part // grid * grid),
            max(grid, usual.height // part // grid * grid),
        )
        for part in SMALLER
    ]
    requests = [replace(usual, width=width, height=height) for width, height in sizes]
    return [request for request in requests if request.pixels < usual.pixels]


def _once(pipeline: Pipeline, request: ImageRequest) -> None:
    [conditioning] = pipeline.encode([request])
    sample = pipeline.start(replace(request), conditioning)
    while not sample.done:
        pipeline.step([sample], 1)
        if sample.error:
            raise ModelUnavailable(f"model {request.model!r}: its defaults fail: {sample.error}")
    pipeline.decode([sample])


def _fingerprint(pipeline: Pipeline, model: Model, device: str) -> str:
    """Identifies the measurement: model, device, precision, and the shape measured."""
    # Options that aren't set are left out, so a new option doesn't invalidate existing profiles.
    request = probe(model)
    parts = (
        model.path,
        str(model.revision),
        model.dtype,
        model.placement,
        _device_name(device),
        str(torch.get_num_threads()),
        torch.__version__,
        str(tokens_of(pipeline, request)),
        *(f"{part}={getattr(model, part)}" for part in _SPEEDS if getattr(model, part)),
        *(f"{part}={getattr(model, part)}" for part in _DEGREES if getattr(model, part) != 1),
    )
    return f"{model.name}-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:12]}"


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def _described(model: Model, device: str, costs: Costs) -> dict[str, Any]:
    return {"model": model.name, "device": _device_name(device), "points": costs.points}


def _keep(path: Path, model: Model, device: str, costs: Costs) -> None:
    """Write the profile, unless another worker has written one in the meantime."""
    # Unlike a rename, a link fails if the file exists. Another worker may already use that file.
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
    return int(json.loads(path.read_text()).get("doubts", 0))


def _note_doubts(path: Path, doubts: int) -> None:
    """Write the number of doubts; a failed write only loses the number."""
    if doubts == _doubts(path):
        return
    try:
        _write(path, {**json.loads(path.read_text()), "doubts": doubts})
    except OSError as error:
        log.warning("warm-up: can't write note", note=str(path), reason=str(error))


def _read(path: Path) -> Costs:
    described = json.loads(path.read_text())["points"]
    points = tuple((int(tokens), float(seconds)) for tokens, seconds in described)
    return Costs(points, pinning=points)
