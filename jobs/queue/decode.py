"""What the queue's hashes and lists say, as the frozen values of `jobs/job.py`.

Pure: turns the server's answers into values. Knows the fields that the Lua scripts write, and
talks to no server.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from jobs.job import Counts, ImageResult, ImageView, Job, Lease, State, job_state
from jobs.request import ImageRequest


class Commit(StrEnum):
    """The answer to one commit."""

    COMMITTED = "committed"
    ALREADY_YOURS = "already"
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class Submitted:
    """The job of a submission; `created` is False where the Idempotency-Key found an older one."""

    job_id: str
    created: bool


@dataclass(frozen=True, slots=True)
class Beat:
    """Keys (`job:index`) that a worker should stop with: another's or gone, and cancelled.

    `wished` are those of which somebody wants to see a preview.
    """

    lost: frozenset[str]
    cancelled: frozenset[str]
    wished: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Ahead:
    """How many images go before a job's next and before its last one that is ready.

    `work` is what others have before the last, in pixel-steps.
    """

    next: int
    last: int
    work: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A live worker, and what it said of itself when it last registered."""

    id: str
    info: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of the stream; `id` is where to read on.

    `type` is a job's new state (queued, running, succeeded, failed, cancelled), or
    `image` and `image_failed` (`index` says which; data has the error), `progress` (something else
    changed; at most every 250 ms a job), or `deleted`.
    """

    id: str
    job_id: str
    type: str
    index: int | None
    data: dict[str, Any]


def packed(request: ImageRequest) -> str:
    """A request as the queue keeps it: what Lua needs in front, the JSON behind."""
    return f"{request.width} {request.height} {request.steps}\n{request.to_json()}"


def job_view(job_id: str, found: Mapping[str, str], steps: Iterable[str]) -> Job:
    """A job from its hash and the reported steps of its running images."""
    counts = Counts(
        total=int(found["total"]),
        queued=int(found["queued"]),
        running=int(found["running"]),
        succeeded=int(found["succeeded"]),
        failed=int(found["failed"]),
        cancelled=int(found["cancelled"]),
    )
    done = int(float(found["steps_done"])) + sum(map(int, steps))
    return Job(
        id=job_id,
        tenant=found["tenant"],
        model=found["model"],
        priority=int(found["priority"]),
        state=job_state(counts),
        counts=counts,
        progress=min(1.0, done / int(found["steps_total"])),
        created=int(found["created"]) / 1000,
        started=_seconds(found.get("started")),
        finished=_seconds(found.get("finished")),
        expires=_seconds(found.get("expires")),
        version=found["version"],
        metadata=json.loads(found["metadata"]),
        steps=int(found["steps_total"]),
        cost=float(found["cost"]),
    )


def image_view(
    index: int, request: str, record: str | None, step: str | None, cut: int | None
) -> ImageView:
    """An image from what the queue holds of it; images from `cut` on went untouched."""
    values = ImageRequest.from_json(request.partition("\n")[2])
    if record is None:
        state = State.QUEUED if cut is None or index < cut else State.CANCELLED
        return ImageView(index, values, state, 0, 0, None, None)
    found = json.loads(record)
    state = State(found["state"])
    reported = int(step or found.get("step", 0))
    return ImageView(
        index=index,
        request=values,
        state=state,
        step=values.steps if state is State.SUCCEEDED else reported,
        attempts=int(found["attempt"]),
        result=_result(found["result"]) if state is State.SUCCEEDED else None,
        error=found["error"] if state is State.FAILED else None,
    )


def lease_view(found: Sequence[Any]) -> Lease:
    """A lease from claim.lua's answer."""
    job_id, index, token, attempt, stalls, priority, body, trace, age = found
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


def ahead_view(found: Sequence[Any]) -> Ahead | None:
    """position.lua's answer."""
    return Ahead(int(found[0]), int(found[1]), float(found[2])) if found else None


def event_view(event_id: str, found: Mapping[str, str]) -> Event:
    """An event from its stream entry."""
    index = int(found["index"]) if found["index"] else None
    data = json.loads(found["data"]) if found["data"] else {}
    return Event(event_id, found["job"], found["type"], index, data)


def result_json(result: ImageResult) -> str:
    """A result as the queue keeps it."""
    return json.dumps(
        {
            "uri": result.uri,
            "sha256": result.sha256,
            "size": result.size,
            "media_type": result.media_type,
            "seconds": result.seconds,
        }
    )


def _result(text: str) -> ImageResult:
    return ImageResult(**json.loads(text))


def _seconds(milliseconds: str | None) -> float | None:
    return None if milliseconds is None else int(milliseconds) / 1000
