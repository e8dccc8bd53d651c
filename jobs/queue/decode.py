"""Converts the queue's hashes and lists into the frozen values of `jobs/job.py`, and back.

All functions are pure and talk to no server. They know the fields that the Lua scripts write.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from jobs.job import Counts, ImageResult, ImageView, Job, Lease, State, Undelivered, job_state
from jobs.reports import WorkerReport
from jobs.request import ImageRequest


class Commit(StrEnum):
    """The answer to a commit. STALE means that the lease is no longer valid."""

    COMMITTED = "committed"
    ALREADY_YOURS = "already"
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class Submitted:
    """A submission's job; `created` is False if the Idempotency-Key matched an earlier one."""

    job_id: str
    created: bool


@dataclass(frozen=True, slots=True)
class Beat:
    """Keys (`job:index`) of images that a worker should drop, because they are lost or cancelled.

    `wished` are images that someone wants to preview.
    """

    lost: frozenset[str]
    cancelled: frozenset[str]
    wished: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Ahead:
    """How many images go before a job's next ready image, and before its last.

    `work` is that of other jobs' images before the last, in pixel-steps.
    """

    next: int
    last: int
    work: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A live worker, and the report it last registered with."""

    id: str
    report: WorkerReport


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of the event stream; pass `id` to read what follows it.

    `type` is a job's new state (queued, running, succeeded, failed, cancelled); `image` or
    `image_failed` (`index` says which one, `data` has the error); `progress` (something else
    changed; at most every 250 ms per job); or `deleted`.
    """

    id: str
    job_id: str
    type: str
    index: int | None
    data: dict[str, Any]


def packed(request: ImageRequest) -> str:
    """A request as the queue stores it: a line with what Lua needs, then the JSON."""
    return f"{request.width} {request.height} {request.steps}\n{request.to_json()}"


def job_view(job_id: str, fields: Mapping[str, str], steps: Iterable[str]) -> Job:
    """A job from its hash and the reported steps of its running images."""
    counts = Counts(
        total=int(fields["total"]),
        queued=int(fields["queued"]),
        running=int(fields["running"]),
        succeeded=int(fields["succeeded"]),
        failed=int(fields["failed"]),
        cancelled=int(fields["cancelled"]),
    )
    done = int(float(fields["steps_done"])) + sum(map(int, steps))
    return Job(
        id=job_id,
        tenant=fields["tenant"],
        model=fields["model"],
        priority=int(fields["priority"]),
        state=job_state(counts),
        counts=counts,
        progress=min(1.0, done / int(fields["steps_total"])),
        created=int(fields["created"]) / 1000,
        started=_seconds(fields.get("started")),
        finished=_seconds(fields.get("finished")),
        expires=_seconds(fields.get("expires")),
        version=fields["version"],
        metadata=json.loads(fields["metadata"]),
        steps=int(fields["steps_total"]),
        cost=float(fields["cost"]),
        webhook=json.loads(fields["spec"]).get("webhook"),
        undelivered=_undelivered(fields.get("undelivered")),
    )


def image_view(
    index: int, request: str, record: str | None, step: str | None, cut: int | None
) -> ImageView:
    """An image from what the queue stores about it.

    An image without a record was never claimed; from index `cut` on, such images are cancelled.
    """
    values = ImageRequest.from_json(request.partition("\n")[2])
    if record is None:
        state = State.QUEUED if cut is None or index < cut else State.CANCELLED
        return ImageView(index, values, state, 0, 0, None, None)
    fields = json.loads(record)
    state = State(fields["state"])
    reported = int(step or fields.get("step", 0))
    return ImageView(
        index=index,
        request=values,
        state=state,
        step=values.steps if state is State.SUCCEEDED else reported,
        attempts=int(fields["attempt"]),
        result=_result(fields["result"]) if state is State.SUCCEEDED else None,
        error=fields["error"] if state is State.FAILED else None,
    )


def lease_view(answer: Sequence[Any]) -> Lease:
    """A lease from claim.lua's answer."""
    job_id, index, token, attempt, stalls, priority, body, trace, age = answer
    return Lease(
        job_id=job_id,
        index=int(index),
        token=token,
        attempt=int(attempt),
        solo=int(stalls) > 0,
        request=ImageRequest.from_json(body),
        priority=int(priority),
        trace=trace,
        age=int(age) / 1000,
    )


def ahead_view(answer: Sequence[Any]) -> Ahead | None:
    """A job's place from position.lua's answer; None if none of its images is ready."""
    return Ahead(int(answer[0]), int(answer[1]), float(answer[2])) if answer else None


def event_view(event_id: str, fields: Mapping[str, str]) -> Event:
    """An event from its stream entry."""
    index = int(fields["index"]) if fields["index"] else None
    data = json.loads(fields["data"]) if fields["data"] else {}
    return Event(event_id, fields["job"], fields["type"], index, data)


def result_json(result: ImageResult) -> str:
    """A result as the queue stores it."""
    values: dict[str, Any] = {
        "uri": result.uri,
        "sha256": result.sha256,
        "size": result.size,
        "media_type": result.media_type,
        "seconds": result.seconds,
    }
    if result.warnings:
        values["warnings"] = result.warnings
    return json.dumps(values)


def _result(text: str) -> ImageResult:
    values = json.loads(text)
    return ImageResult(**{**values, "warnings": tuple(values.get("warnings", ()))})


def undelivered_json(message: Undelivered) -> str:
    """An undelivered message as the queue stores it."""
    return json.dumps(asdict(message))


def _undelivered(text: str | None) -> tuple[Undelivered, ...]:
    messages = json.loads(text) if text else {}
    return tuple(Undelivered(**json.loads(messages[name])) for name in sorted(messages))


def _seconds(milliseconds: str | None) -> float | None:
    return None if milliseconds is None else int(milliseconds) / 1000
