"""The queue: its atomic moves and what each one guarantees.

Every method that changes a job runs one script of `jobs/queue/lua`, which takes effect completely
or not at all. A worker's moves include its lease's token, which the script checks. Every script can
be repeated, for example if its reply was lost. All times are the server's. Reads are in
`jobs/queue/reader.py`, and key names in `jobs/queue/keys.py`. This module is independent of models,
files and HTTP.
"""

import json
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any, Self

from jobs.errors import (
    Conflict,
    IdempotencyMismatch,
    InvalidRequest,
    NotFound,
    QuotaExceeded,
)
from jobs.job import ImageResult, Job, Lease, Undelivered
from jobs.queue.connection import LONGEST_BLOCK_SECONDS, Connection
from jobs.queue.decode import (
    Ahead,
    Beat,
    Commit,
    Event,
    Submitted,
    WorkerInfo,
    lease_view,
    packed,
    result_json,
    undelivered_json,
)
from jobs.queue.keys import LIFETIMES_MS
from jobs.queue.reader import Reader
from jobs.reports import ModelCard, WorkerReport
from jobs.request import ImageRequest

__all__ = ["Ahead", "Beat", "Commit", "Event", "Store", "Submitted", "WorkerInfo"]

LARGEST_CLAIM = 1000
"""Most images in one claim."""

_LINGER_POLL_SECONDS = 0.02


class Store(Reader):
    """One pool of a queue server. Thread-safe."""

    @classmethod
    def connect(cls, url: str, *, pool: str = "default", timeout: float = 5.0) -> Self:
        """Connect to `redis://`, `rediss://` or `unix://`; `timeout` is in seconds, per answer.

        Raises StorageUnavailable, or ConfigurationError if the server is too old.
        """
        connection = Connection(url, pool, timeout)
        try:
            connection.check_server()
        except BaseException:
            connection.close()
            raise
        return cls(connection)

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()

    # Callers' moves ---------------------------------------------------------------------------

    def submit(
        self,
        requests: Sequence[ImageRequest],
        *,
        tenant: str,
        priority: int,
        weight: float = 1,
        idempotency: tuple[str, str] | None = None,
        metadata: Mapping[str, Any],
        spec: Mapping[str, Any],
        quota: int,
        keep_seconds: float,
        max_attempts: int,
        max_stalls: int = 3,
        trace: str = "",
    ) -> Submitted:
        """Queue a job, with all of its images or none. All requests must be for the same model.

        `idempotency` is the caller's key and a hash of the request body: within 24 hours the same
        pair returns the same job, unless it was deleted. `quota` is how many unfinished images the
        tenant may have. `trace` is returned with every lease. Raises QuotaExceeded,
        IdempotencyMismatch, ValueError.
        """
        _check_submission(requests, tenant, priority, weight)
        key, body = idempotency or (secrets.token_hex(16), "")
        lifetime = LIFETIMES_MS["once" if idempotency else "once_without_key"]
        costs = [request.pixels * request.steps for request in requests]
        outcome, detail = self._connection.run(
            "submit",
            sha256(json.dumps([tenant, key]).encode()).hexdigest(),
            body,
            lifetime,
            secrets.token_hex(5),
            tenant,
            requests[0].model,
            priority,
            weight,
            quota,
            round(keep_seconds * 1000),
            max_attempts,
            max_stalls,
            json.dumps(metadata),
            json.dumps(spec),
            sum(request.steps for request in requests),
            sum(costs) / len(costs),
            trace,
            *map(packed, requests),
        )
        if outcome == "quota":
            raise QuotaExceeded(
                f"{len(requests)} images plus {detail} unfinished ones exceed the quota of {quota}"
            )
        if outcome == "mismatch":
            raise IdempotencyMismatch("this Idempotency-Key was already used with a different body")
        return Submitted(detail, outcome == "created")

    def cancel(self, job_id: str, tenant: str | None) -> Job:
        """Cancel the unfinished images; a finished job stays unchanged. Raises NotFound."""
        self._move("cancel", job_id, tenant, secrets.token_hex(8))
        return self.job(job_id, tenant)

    def retry(self, job_id: str, tenant: str | None) -> Job:
        """Queue the failed and cancelled images again. Raises NotFound, or Conflict if none."""
        if self._move("retry", job_id, tenant, secrets.token_hex(8)) == "none":
            raise Conflict(f"job {job_id} has no failed or cancelled images")
        return self.job(job_id, tenant)

    def delete(self, job_id: str, tenant: str | None) -> None:
        """Remove the job at once; `due` returns it when its files can go. Raises NotFound."""
        self._move("delete", job_id, tenant, secrets.token_hex(16))

    def _move(self, script: str, job_id: str, tenant: str | None, nonce: str) -> str:
        outcome = self._connection.run(script, job_id, tenant or "", nonce)
        if outcome == "missing":
            raise NotFound(f"job {job_id} not found")
        return str(outcome)

    # Webhooks ---------------------------------------------------------------------------------

    def undelivered(self, job_id: str, message: Undelivered) -> None:
        """Show in the job that a message wasn't delivered; a job that's gone is ignored."""
        self._connection.run("undelivered", job_id, message.id, undelivered_json(message))

    def delivered(self, job_id: str, message_id: str) -> None:
        """No longer show a message as undelivered."""
        self._connection.run("undelivered", job_id, message_id, "")

    # Workers' moves ---------------------------------------------------------------------------

    def claim(
        self,
        model: str,
        worker: str,
        *,
        limit: int,
        lease_seconds: float,
        prefer: tuple[int, int] | None = None,
        linger_seconds: float = 0,
        nonce: str,
        held: Iterable[str] = (),
        joins_from: int | None = None,
    ) -> list[Lease]:
        """Lease the next images of `model`, at most `limit`.

        A repeated `nonce` returns the same leases, so a call whose reply was lost can be repeated.
        `held` are the keys of the images that the worker holds; other images of its previous claim
        go back to the queue. Images of the width and height `prefer` may overtake a few others.
        `linger_seconds` is how long, after the queue was last empty, to wait for `limit` images. An
        image whose worker died is leased alone. `joins_from` is for a full worker: it gets only
        images of jobs that it holds nothing of, at this priority or higher.
        """
        width, height = prefer or ("", "")
        while True:
            outcome, *details = self._connection.run(
                "claim",
                model,
                worker,
                min(limit, LARGEST_CLAIM),
                _milliseconds(lease_seconds),
                width,
                height,
                _milliseconds(linger_seconds),
                nonce,
                secrets.token_hex(4),
                "" if joins_from is None else joins_from,
                *held,
            )
            if outcome == "leases":
                return [lease_view(lease) for lease in details]
            time.sleep(min(_LINGER_POLL_SECONDS, int(details[0]) / 1000))

    def wait(self, model: str, seconds: float) -> None:
        """Block until there may be work for `model`, for at most `seconds` or 4.5 s."""
        bell = self._keys("bell", model)
        timeout = max(0.01, min(seconds, LONGEST_BLOCK_SECONDS))  # 0 would block forever
        self._connection.block(lambda client: client.blpop([bell], timeout))

    def beat(
        self, worker: str, leases: Mapping[tuple[str, str], int], lease_seconds: float
    ) -> Beat:
        """Extend leases, given as (key, token) -> last step.

        Returns which leases have ended, and which images someone wants to preview.
        """
        args: list[str | int] = []
        for (key, token), step in leases.items():
            args += [*_split(key), token, step]
        answers = self._connection.run("beat", _milliseconds(lease_seconds), *args) if args else []
        keys = [key for key, _ in leases]
        pairs = list(zip(keys, answers, strict=True))
        return Beat(
            lost=frozenset(key for key, answer in pairs if answer == "lost"),
            cancelled=frozenset(key for key, answer in pairs if answer == "cancelled"),
            wished=frozenset(key for key, answer in pairs if answer == "wished"),
        )

    def want_preview(self, job_id: str, index: int) -> None:
        """Ask an image's worker for previews for 15 seconds; an unknown image is ignored."""
        self._connection.run("wish", job_id, index)

    def commit(self, finished: Sequence[tuple[Lease, ImageResult]]) -> list[Commit]:
        """Finish images whose files are stored. Returns one answer per image."""
        args: list[str | int] = []
        for lease, result in finished:
            args += [lease.job_id, lease.index, lease.token, result_json(result)]
        return [Commit(answer) for answer in self._connection.run("commit", *args)] if args else []

    def fail(self, lease: Lease, error: str, *, again: bool, delay_seconds: float = 0) -> bool:
        """Report a failure; returns False if the worker no longer held the lease.

        The image is queued again after the delay if `again` is set and it has attempts left.
        Otherwise its state becomes failed.
        """
        outcome = self._connection.run(
            "fail",
            lease.job_id,
            lease.index,
            lease.token,
            error.encode("utf-8", "backslashreplace").decode(),
            int(again),
            _milliseconds(delay_seconds),
        )
        return bool(outcome != "stale")

    def release(self, leases: Iterable[Lease]) -> int:
        """Give images back, which doesn't count as an attempt. Returns how many were still held."""
        args: list[str | int] = []
        for lease in leases:
            args += [lease.job_id, lease.index, lease.token]
        return int(self._connection.run("release", *args)) if args else 0

    # Maintenance ------------------------------------------------------------------------------

    def sweep(self, limit: int = 256) -> int:
        """Take images from workers whose leases expired, and wake delayed images that are due.

        Returns how many moved. Any process may call it at any time, and some process must call it
        every few seconds. The first call after a pause longer than a lease extends expired leases
        for a short time, so that after an outage workers can beat before they lose their images.
        """
        return int(self._connection.run("sweep", limit))

    def due(self, limit: int) -> list[str]:
        """Deleted and expired jobs whose files can be removed; call `forget` on each afterwards.

        Jobs returned here can no longer be read. A job is returned again a minute later, to any
        caller, unless it was forgotten.
        """
        return [str(job_id) for job_id in self._connection.run("due", limit)]

    def forget(self, job_id: str) -> None:
        """Report that a job's files are removed. Does nothing for a job that can still be read."""
        self._connection.run("forget", job_id)

    def register(self, worker_id: str, report: WorkerReport, ttl_seconds: float) -> None:
        """Register a worker as alive for `ttl_seconds`, with its report."""
        text = json.dumps(report.to_dict())
        self._connection.run("register", worker_id, text, _milliseconds(ttl_seconds))

    def unregister(self, worker_id: str) -> None:
        """Remove a worker's registration."""
        self._connection.ask(lambda client: client.delete(self._keys("worker", worker_id)))
        self._connection.ask(lambda client: client.zrem(self._keys("workers"), worker_id))

    def publish_card(self, model: str, card: ModelCard) -> None:
        """Publish a model's card."""
        text = json.dumps(card.to_dict())
        self._connection.ask(lambda client: client.hset(self._keys("cards"), model, text))


def _check_submission(
    requests: Sequence[ImageRequest], tenant: str, priority: int, weight: float
) -> None:
    if not requests:
        raise InvalidRequest("a job needs at least one prompt")
    if len({request.model for request in requests}) > 1:
        raise ValueError("all requests of a job must be for one model")
    if not tenant or priority not in range(10) or not 0 < weight < float("inf"):
        raise ValueError("a job needs a tenant, a priority from 0 to 9 and a weight above 0")


def _split(key: str) -> tuple[str, int]:
    """The job id and the index in `job:index`."""
    job_id, _, index = key.rpartition(":")
    return job_id, int(index)


def _milliseconds(seconds: float) -> int:
    return max(0, round(seconds * 1000))
