"""Jobs and images as the queue knows them: the states, who moves them, and frozen views.

    image:   queued ──claim──> running ──commit──> succeeded
               ^ ^                │ ├──fail (final)──> failed ──retry──> queued
               │ └─fail (again)───┘ │
               └───lease lost───────┘     queued | running ──cancel──> cancelled ──retry──> queued

A job's state follows from its counts alone (`job_state`), so it can never contradict its images.
The moves themselves are the Lua scripts in `jobs/queue/lua`; nothing here changes anything.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from jobs.request import ImageRequest


class State(StrEnum):
    """The states of an image request and of a job; `STATES` says what each one means."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen unless somebody retries."""
        return self in FINISHED


FINISHED = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})

STATES = {
    State.QUEUED: "Waiting for a worker, for the first time or again after a setback.",
    State.RUNNING: "A worker holds a lease on it and is making it.",
    State.SUCCEEDED: "Its bytes are safe and its result is committed, exactly once.",
    State.FAILED: "It could not be made; the error says why.",
    State.CANCELLED: "Somebody stopped it before it was finished.",
}


@dataclass(frozen=True, slots=True)
class Counts:
    """How many images of a job are in each state; they add up to `total`."""

    total: int
    queued: int
    running: int
    succeeded: int
    failed: int
    cancelled: int

    @property
    def finished(self) -> int:
        """Images on which nothing more will happen."""
        return self.succeeded + self.failed + self.cancelled


def job_state(counts: Counts) -> State:
    """The state of a job with these counts.

    A finished job with a failed image is `failed` (its good images stay); else one with a
    cancelled image is `cancelled`; else `succeeded`. An unfinished job is `running` once any
    image has left the queue, and `queued` before.
    """
    if counts.finished == counts.total:
        if counts.failed:
            return State.FAILED
        return State.CANCELLED if counts.cancelled else State.SUCCEEDED
    return State.QUEUED if counts.queued == counts.total else State.RUNNING


@dataclass(frozen=True, slots=True)
class ImageResult:
    """A committed image: where its bytes are and what they are.

    `uri` is what the image store returned, `sha256` is of the file's bytes, hexadecimal;
    `size` is in bytes; `seconds` is from claim to commit.
    """

    uri: str
    sha256: str
    size: int
    media_type: str
    seconds: float


@dataclass(frozen=True, slots=True)
class ImageView:
    """One image of a job as of now; `step` is the last one that a worker reported."""

    index: int
    request: ImageRequest
    state: State
    step: int
    attempts: int
    result: ImageResult | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Job:
    """A job's own record, without its images. Times are seconds since the epoch, server clock.

    `progress` is the share of all denoising steps that are done, 0..1, finished images counted
    whole. `version` changes with every visible change of the job and serves as its ETag. `steps`
    are those of all images, `cost` is the mean image's, in pixel-steps.
    """

    id: str
    tenant: str
    model: str
    priority: int
    state: State
    counts: Counts
    progress: float
    created: float
    started: float | None
    finished: float | None
    expires: float | None
    version: str
    metadata: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    cost: float = 0.0


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker's claim on one image until `deadline`, fenced by `token`.

    Only the holder of the current token can extend, commit or fail it. `attempt` counts from 1.
    `solo` marks an image whose earlier worker died: it runs alone, so that a poisonous one takes
    no neighbours with it. `priority` is its job's, 0..9; `trace` the `traceparent` of its POST, or
    ""; `age` the seconds from its POST to this claim.
    """

    job_id: str
    index: int
    token: str
    attempt: int
    solo: bool
    request: ImageRequest
    priority: int = 5
    trace: str = ""
    age: float = 0.0

    @property
    def key(self) -> str:
        """`job:index`, the image's name inside the queue."""
        return f"{self.job_id}:{self.index}"
