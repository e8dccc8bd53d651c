"""Jobs and images in the queue: their states, the moves between them, and frozen views.

    image:   queued ──claim──> running ──commit──> succeeded
               ^ ^                │ ├──fail (final)──> failed ──retry──> queued
               │ └─fail (again)───┘ │
               └───lease lost───────┘     queued | running ──cancel──> cancelled ──retry──> queued

A job's state is derived from its counts (`job_state`), so it can't contradict its images. The moves
themselves are the Lua scripts in `jobs/queue/lua`; this module is read-only.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from jobs.request import ImageRequest


class State(StrEnum):
    """The states of an image and of a job.

    Of an image: waiting for a worker, for the first time or again; leased by a worker; stored and
    committed, exactly once; couldn't be made, and the error says why; stopped before it finished.
    """

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen without a retry."""
        return self in FINISHED


WebhookEvent = Literal[
    "job.succeeded", "job.failed", "job.cancelled", "image.succeeded", "image.failed"
]
"""What a webhook can be notified of."""

FINISHED = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})


@dataclass(frozen=True, slots=True)
class Counts:
    """How many of a job's images are in each state; they add up to `total`."""

    total: int
    queued: int
    running: int
    succeeded: int
    failed: int
    cancelled: int

    @property
    def finished(self) -> int:
        """Images that are finished, however they ended."""
        return self.succeeded + self.failed + self.cancelled


def job_state(counts: Counts) -> State:
    """The state of a job with these counts.

    A finished job is `failed` if any image failed (its other images stay), otherwise `cancelled`
    if any was cancelled, otherwise `succeeded`. An unfinished job is `queued` until its first image
    leaves the queue, and then `running`.
    """
    if counts.finished == counts.total:
        if counts.failed:
            return State.FAILED
        return State.CANCELLED if counts.cancelled else State.SUCCEEDED
    return State.QUEUED if counts.queued == counts.total else State.RUNNING


@dataclass(frozen=True, slots=True)
class ImageResult:
    """A committed image's file.

    `uri` comes from the image store; `sha256` is the file's hash in hexadecimal, `size` is in
    bytes; `seconds` is the time from claim to commit; `warnings` are what the caller may not expect
    of this image.
    """

    uri: str
    sha256: str
    size: int
    media_type: str
    seconds: float
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ImageView:
    """One image of a job as of now; `step` is the last step that a worker reported."""

    index: int
    request: ImageRequest
    state: State
    step: int
    attempts: int
    result: ImageResult | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Undelivered:
    """A webhook message that a job's receiver hasn't accepted. Times are seconds since the epoch.

    `event` is what it's about, `reason` why the last of its `attempts` failed. `next_attempt` is
    None if it was given up.
    """

    id: str
    event: str
    attempts: int
    last_attempt: float
    reason: str
    next_attempt: float | None


@dataclass(frozen=True, slots=True)
class Job:
    """A job's own record, without its images. Times are seconds since the epoch, server clock.

    `progress` is the share of all denoising steps that are done, 0..1; succeeded and failed images
    count in full, cancelled ones as far as they came. `version` changes with every visible change
    to the job and is used as its ETag. `steps` is the total over all images, `cost` the mean
    image's cost in pixel-steps. `webhook` is what its caller sent, `undelivered` its newest
    messages that weren't accepted, oldest first.
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
    webhook: dict[str, Any] | None = None
    undelivered: tuple[Undelivered, ...] = ()


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker's claim on one image, fenced by `token`.

    Only the holder of the current token can extend, commit or fail it. `attempt` counts from 1.
    `solo` marks an image whose previous worker died: it runs alone, so that if it kills its worker
    it takes no other images down. `priority` is its job's, 0..9; `trace` is the `traceparent` of
    its POST, or ""; `age` is the time from its POST to this claim, in seconds.
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
        """`job:index`, the image's name in the queue."""
        return f"{self.job_id}:{self.index}"
