"""The read half of the store: jobs, images, positions, workers, events.

Keys that belong together are read in one transaction, so that a job never contradicts its images.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from jobs.errors import FieldProblem, InvalidRequest, NotFound
from jobs.job import ImageView, Job, State
from jobs.queue.connection import LONGEST_BLOCK_SECONDS, Connection
from jobs.queue.decode import (
    Ahead,
    Event,
    WorkerInfo,
    ahead_view,
    event_view,
    image_view,
    job_view,
)
from jobs.reports import ModelCard, WorkerReport

_PAGE = 100
"""Jobs read per round trip, when listing."""

_MOST_READ = 2000
"""Most jobs that one call of `jobs` reads, to find those in a state."""

CURSOR = r"^[0-9]{1,20}$"
"""Pattern of the cursors that `jobs` returns."""

_EVENTS_AT_ONCE = 1000

_FEW = 256
"""Up to this many images are read by index; for more, the whole hashes are read."""


class Reader:
    """Reads one pool. Every method raises StorageUnavailable if the server is unavailable."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._keys = connection.keys

    def ping(self) -> None:
        """Return if the server accepts commands."""
        self._connection.ask(lambda client: client.ping())

    def job(self, job_id: str, tenant: str | None) -> Job:
        """The job as of now; with `tenant` None, of any tenant. Raises NotFound."""
        [(fields, steps)] = self._jobs([job_id])
        if not fields or tenant not in (None, fields["tenant"]):
            raise NotFound(f"job {job_id} not found")
        return job_view(job_id, fields, steps)

    def job_and_images(self, job_id: str, tenant: str | None) -> tuple[Job, list[ImageView]]:
        """The job and its images, from the same moment. Raises NotFound."""
        key = self._keys
        fields, requests, records, steps = self._connection.read(
            ("HGETALL", key("job", job_id)),
            ("LRANGE", key("requests", job_id), 0, -1),
            ("HGETALL", key("images", job_id)),
            ("HGETALL", key("steps", job_id)),
        )
        if not fields or tenant not in (None, fields["tenant"]):
            raise NotFound(f"job {job_id} not found")
        views = _image_views(fields.get("cut"), requests, records, steps)
        return job_view(job_id, fields, steps.values()), views

    def snapshot(
        self, job_id: str, tenant: str | None, *, images: bool
    ) -> tuple[Job, list[ImageView], Ahead | None]:
        """The job, its images if `images`, and the work ahead of it, all from the same moment.

        Raises NotFound.
        """
        key = self._keys
        commands: list[tuple[str | int, ...]] = [
            ("HGETALL", key("job", job_id)),
            ("HVALS", key("steps", job_id)),
        ]
        if images:
            commands += [
                ("LRANGE", key("requests", job_id), 0, -1),
                ("HGETALL", key("images", job_id)),
                ("HGETALL", key("steps", job_id)),
            ]
        ahead, fields, steps, *rest = self._connection.run_and_read(
            "position", (job_id,), *commands
        )
        if not fields or tenant not in (None, fields["tenant"]):
            raise NotFound(f"job {job_id} not found")
        views = _image_views(fields.get("cut"), *rest) if images else []
        return job_view(job_id, fields, steps), views, ahead_view(ahead)

    def spec(self, job_id: str) -> dict[str, Any]:
        """The `spec` that `submit` stored. Raises NotFound."""
        text = self._connection.ask(lambda client: client.hget(self._keys("job", job_id), "spec"))
        if text is None:
            raise NotFound(f"job {job_id} not found")
        spec: dict[str, Any] = json.loads(text)
        return spec

    def jobs(
        self, tenant: str, *, state: State | None = None, cursor: str | None = None, limit: int = 50
    ) -> tuple[list[Job], str | None]:
        """A page of a tenant's jobs, newest first, and the cursor of the next page, if any.

        With `state`, a page may be short or empty and still have a next one, because a call reads a
        limited number of jobs. Raises InvalidRequest for an invalid cursor.
        """
        page: list[Job] = []
        # The cursor is that of the last job read, not of the last one returned: with a `state`, the
        # next call continues where this one stopped reading.
        for count, (score, job) in enumerate(self._newest_first(tenant, cursor)):
            if len(page) == limit or count == _MOST_READ:
                return page, cursor
            cursor = score
            if job is not None and state in (None, job.state):
                page.append(job)
        return page, None

    def images(self, job_id: str, start: int = 0, stop: int = -1) -> list[ImageView]:
        """The job's images from index `start` to `stop`, both included; -1 is the last.

        Raises NotFound.
        """
        key = self._keys
        fields, requests, records, steps = self._connection.read(
            ("HMGET", key("job", job_id), "total", "cut"),
            ("LRANGE", key("requests", job_id), start, stop),
            *self._record_commands(job_id, start, stop),
        )
        if fields[0] is None:
            raise NotFound(f"job {job_id} not found")
        first = start if start >= 0 else max(0, int(fields[0]) + start)
        if isinstance(records, list):
            cut = None if fields[1] is None else int(fields[1])
            return [
                image_view(index, *image, cut)
                for index, image in enumerate(zip(requests, records, steps, strict=False), first)
            ]
        return _image_views(fields[1], requests, records, steps, first)

    def image(self, job_id: str, index: int) -> ImageView:
        """One image. Raises NotFound."""
        images = self.images(job_id, index, index) if index >= 0 else []
        if not images:
            raise NotFound(f"job {job_id} has no image {index}")
        return images[0]

    def ahead(self, job_id: str) -> Ahead | None:
        """How many images go before the job's next one and its last one, if no other job joins.

        None if none of the job's images is ready to be claimed. Exact if images cost the same.
        """
        return ahead_view(self._connection.run("position", job_id))

    def position(self, job_id: str) -> int | None:
        """How many images go before the job's next one; None if none is ready."""
        ahead = self.ahead(job_id)
        return None if ahead is None else ahead.next

    def queue_depth(self) -> dict[str, dict[int, int]]:
        """Images that are ready to be claimed, per model and priority."""
        counts = self._connection.ask(lambda client: client.hgetall(self._keys("depth")))
        depths: dict[str, dict[int, int]] = {}
        for band, count in sorted(counts.items()):
            model, _, priority = band.rpartition(":")
            depths.setdefault(model, {})[int(priority)] = int(count)
        return depths

    def tallies(self) -> dict[str, dict[str, int]]:
        """Counters since the pool was created, per kind and model.

        `lost` counts leases that expired, `retried` images tried again after a failure, `refused`
        commits that came too late. `waits` counts first claims, `waited_ms` adds up the time since
        their job was submitted, and `wait_MS` counts those that waited at most MS.
        """
        tallies = self._connection.ask(lambda client: client.hgetall(self._keys("tallies")))
        counts: dict[str, dict[str, int]] = {}
        for name, count in sorted(tallies.items()):
            what, _, model = name.partition(":")
            counts.setdefault(what, {})[model] = int(count)
        return counts

    def workers(self) -> list[WorkerInfo]:
        """The workers whose registration hasn't expired, sorted by id."""
        ids = self._connection.ask(lambda client: client.zrange(self._keys("workers"), 0, -1))
        if not ids:
            return []
        names = [self._keys("worker", worker) for worker in sorted(ids)]
        reports = self._connection.ask(lambda client: client.mget(names))
        pairs = zip(sorted(ids), reports, strict=True)
        return [
            WorkerInfo(worker, WorkerReport.from_dict(json.loads(text)))
            for worker, text in pairs
            if text
        ]

    def card(self, model: str) -> ModelCard | None:
        """The card that a worker published for the model, if any."""
        text = self._connection.ask(lambda client: client.hget(self._keys("cards"), model))
        return None if text is None else ModelCard.from_dict(json.loads(text))

    def last_event(self) -> str:
        """The id to pass to `events` to read what happens from now on."""
        entries = self._connection.ask(
            lambda client: client.xrevrange(self._keys("events"), count=1),
        )
        return str(entries[0][0]) if entries else "0-0"

    def events(self, after: str, block_seconds: float) -> list[Event]:
        """Events after the id `after`, oldest first; waits up to 4.5 s for one, or not at all if 0.

        Get the first id from `last_event`, because two calls with "$" would miss events in between.
        """
        block = round(min(block_seconds, LONGEST_BLOCK_SECONDS) * 1000)
        key = self._keys("events")
        streams = self._connection.block(
            lambda client: client.xread({key: after}, _EVENTS_AT_ONCE, block if block > 0 else None)
        )
        return [event_view(*entry) for _, entries in streams for entry in entries]

    def _record_commands(self, job_id: str, start: int, stop: int) -> list[tuple[str | int, ...]]:
        """Commands for the records and steps of these images, or of all if there are many."""
        names = [self._keys("images", job_id), self._keys("steps", job_id)]
        if 0 <= start <= stop < start + _FEW:
            return [("HMGET", name, *range(start, stop + 1)) for name in names]
        return [("HGETALL", name) for name in names]

    def _jobs(self, job_ids: list[str]) -> list[tuple[dict[str, str], list[str]]]:
        """The hash and running steps of each job; the hash is empty if the job is gone."""
        commands = [
            command
            for job_id in job_ids
            for command in (
                ("HGETALL", self._keys("job", job_id)),
                ("HVALS", self._keys("steps", job_id)),
            )
        ]
        answers = self._connection.read(*commands)
        return list(zip(answers[::2], answers[1::2], strict=True))

    def _newest_first(self, tenant: str, cursor: str | None) -> Iterator[tuple[str, Job | None]]:
        """The tenant's jobs, each with the cursor that follows it; None for jobs that are gone."""
        if cursor is not None and not re.fullmatch(CURSOR, cursor):
            raise InvalidRequest("invalid cursor", (FieldProblem("/cursor", "invalid cursor"),))
        key = self._keys("jobs", tenant)
        while True:
            top = "+inf" if cursor is None else f"({cursor}"
            command = ("ZREVRANGEBYSCORE", key, top, "-inf", "LIMIT", 0, _PAGE, "WITHSCORES")
            [members] = self._connection.read(command)
            ids, scores = members[::2], members[1::2]
            for job_id, score, (fields, steps) in zip(ids, scores, self._jobs(ids), strict=True):
                yield score, job_view(job_id, fields, steps) if fields else None
            if len(ids) < _PAGE:
                return
            cursor = scores[-1]


def _image_views(
    cut: str | None,
    requests: list[str],
    records: dict[str, str],
    steps: dict[str, str],
    first: int = 0,
) -> list[ImageView]:
    """Images from index `first` on, given the whole hashes of records and steps."""
    record_at, step_at = _by_index(records), _by_index(steps)
    cut_at = None if cut is None else int(cut)
    return [
        image_view(index, request, record_at.get(index), step_at.get(index), cut_at)
        for index, request in enumerate(requests, first)
    ]


def _by_index(values: dict[str, str]) -> dict[int, str]:
    return {int(index): value for index, value in values.items()}
