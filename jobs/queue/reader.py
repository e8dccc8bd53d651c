"""The reading half of the store: jobs, images, positions, workers, events.

Changes nothing. Several keys that belong together are read in one transaction, so that a job never
contradicts its images.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from jobs.errors import FieldProblem, InvalidRequest, NotFound
from jobs.job import ImageView, Job, State
from jobs.queue.connection import LONGEST_BLOCK_SECONDS, Link
from jobs.queue.decode import (
    Ahead,
    Event,
    WorkerInfo,
    ahead_view,
    event_view,
    image_view,
    job_view,
)

_PAGE = 100
"""Jobs looked at in one round trip, where most may be of another state."""

_LOOKED_AT = 2000
"""Jobs that one call looks at, to find those in a state."""

CURSOR = r"^[0-9]{1,20}$"
"""What a cursor of `jobs` looks like."""

_EVENTS_AT_ONCE = 1000

_FEW = 256
"""Up to so many images are read by index; of more, the whole hashes are."""


class Reader:
    """Reads one pool. Every method raises StorageUnavailable when the server is away."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._keys = link.keys

    def ping(self) -> None:
        """Return if the server takes commands."""
        self._link.ask(lambda client: client.ping())

    def job(self, job_id: str, tenant: str | None) -> Job:
        """The job as of now; `tenant` None sees all. Raises NotFound."""
        [(found, steps)] = self._jobs([job_id])
        if not found or tenant not in (None, found["tenant"]):
            raise NotFound(f"no job {job_id}")
        return job_view(job_id, found, steps)

    def look(
        self, job_id: str, tenant: str | None, *, images: bool
    ) -> tuple[Job, list[ImageView], Ahead | None]:
        """The job, its images if they are wanted, and what goes before it: all of one moment.

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
        ahead, found, steps, *rest = self._link.run_and_read("position", (job_id,), *commands)
        if not found or tenant not in (None, found["tenant"]):
            raise NotFound(f"no job {job_id}")
        views = _image_views(found.get("cut"), *rest) if images else []
        return job_view(job_id, found, steps), views, ahead_view(ahead)

    def spec(self, job_id: str) -> dict[str, Any]:
        """What `submit` was given as `spec`. Raises NotFound."""
        found = self._link.ask(lambda client: client.hget(self._keys("job", job_id), "spec"))
        if found is None:
            raise NotFound(f"no job {job_id}")
        spec: dict[str, Any] = json.loads(found)
        return spec

    def jobs(
        self, tenant: str, *, state: State | None = None, cursor: str | None = None, limit: int = 50
    ) -> tuple[list[Job], str | None]:
        """A page of a tenant's jobs, newest first, and the cursor of the next page, if any.

        With `state` a page may be short or empty and yet have a successor: one call looks at a
        bounded number of jobs. Raises InvalidRequest for a cursor that it never gave.
        """
        page: list[Job] = []
        for looked, (score, job) in enumerate(self._newest_first(tenant, cursor)):
            if len(page) == limit or looked == _LOOKED_AT:
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
        fields, requests, records, steps = self._link.read(
            ("HMGET", key("job", job_id), "total", "cut"),
            ("LRANGE", key("requests", job_id), start, stop),
            *self._touched(job_id, start, stop),
        )
        if fields[0] is None:
            raise NotFound(f"no job {job_id}")
        first = start if start >= 0 else max(0, int(fields[0]) + start)
        if isinstance(records, list):
            cut = None if fields[1] is None else int(fields[1])
            return [
                image_view(index, *found, cut)
                for index, found in enumerate(zip(requests, records, steps, strict=False), first)
            ]
        return _image_views(fields[1], requests, records, steps, first)

    def image(self, job_id: str, index: int) -> ImageView:
        """One image. Raises NotFound."""
        found = self.images(job_id, index, index) if index >= 0 else []
        if not found:
            raise NotFound(f"job {job_id} has no image {index}")
        return found[0]

    def ahead(self, job_id: str) -> Ahead | None:
        """How many images go before the job's next and its last one, if nobody joins.

        None when no image of the job is ready to be claimed. Exact where images cost the same.
        """
        return ahead_view(self._link.run("position", job_id))

    def position(self, job_id: str) -> int | None:
        """How many images go before the job's next one; None when none of it is ready."""
        ahead = self.ahead(job_id)
        return None if ahead is None else ahead.next

    def queue_depth(self) -> dict[str, dict[int, int]]:
        """Images that are ready to be claimed, per model and priority."""
        found = self._link.ask(lambda client: client.hgetall(self._keys("depth")))
        depths: dict[str, dict[int, int]] = {}
        for band, count in sorted(found.items()):
            model, _, priority = band.rpartition(":")
            depths.setdefault(model, {})[int(priority)] = int(count)
        return depths

    def tallies(self) -> dict[str, dict[str, int]]:
        """What was counted since the pool began, per kind and model.

        `lost` leases ran out, `retried` images were tried again after a failure, `refused` commits
        came too late; `waits` are first claims, `waited_ms` what they waited since their job's
        submission, and `wait_MS` how many of them waited at most so long.
        """
        found = self._link.ask(lambda client: client.hgetall(self._keys("tallies")))
        counts: dict[str, dict[str, int]] = {}
        for name, count in sorted(found.items()):
            what, _, model = name.partition(":")
            counts.setdefault(what, {})[model] = int(count)
        return counts

    def workers(self) -> list[WorkerInfo]:
        """The workers whose registration has not run out, by id."""
        ids = self._link.ask(lambda client: client.zrange(self._keys("workers"), 0, -1))
        if not ids:
            return []
        names = [self._keys("worker", worker) for worker in sorted(ids)]
        found = self._link.ask(lambda client: client.mget(names))
        pairs = zip(sorted(ids), found, strict=True)
        return [WorkerInfo(worker, json.loads(text)) for worker, text in pairs if text]

    def card(self, model: str) -> dict[str, Any] | None:
        """What a worker published of the model, if one has."""
        text = self._link.ask(lambda client: client.hget(self._keys("cards"), model))
        return None if text is None else dict(json.loads(text))

    def last_event(self) -> str:
        """The id after which `events` finds whatever happens from now on."""
        found = self._link.ask(
            lambda client: client.xrevrange(self._keys("events"), count=1),
        )
        return str(found[0][0]) if found else "0-0"

    def events(self, after: str, block_seconds: float) -> list[Event]:
        """Events after the id `after`, oldest first; waits up to 4.5 s for one, or not at all at 0.

        Take the first id from `last_event`: two calls with "$" miss what happens between them.
        """
        block = round(min(block_seconds, LONGEST_BLOCK_SECONDS) * 1000)
        key = self._keys("events")
        found = self._link.block(
            lambda client: client.xread({key: after}, _EVENTS_AT_ONCE, block if block > 0 else None)
        )
        return [event_view(*entry) for _, entries in found for entry in entries]

    def _touched(self, job_id: str, start: int, stop: int) -> list[tuple[str | int, ...]]:
        """Commands for the records and steps of these images; of all of them if they are many."""
        names = [self._keys("images", job_id), self._keys("steps", job_id)]
        if 0 <= start <= stop < start + _FEW:
            return [("HMGET", name, *range(start, stop + 1)) for name in names]
        return [("HGETALL", name) for name in names]

    def _jobs(self, job_ids: list[str]) -> list[tuple[dict[str, str], list[str]]]:
        """Hash and running steps of each job; an empty hash for one that is gone."""
        commands = [
            command
            for job_id in job_ids
            for command in (
                ("HGETALL", self._keys("job", job_id)),
                ("HVALS", self._keys("steps", job_id)),
            )
        ]
        found = self._link.read(*commands)
        return list(zip(found[::2], found[1::2], strict=True))

    def _newest_first(self, tenant: str, cursor: str | None) -> Iterator[tuple[str, Job | None]]:
        """Every job of the tenant with the cursor that follows it; None for one that is gone."""
        if cursor is not None and not re.fullmatch(CURSOR, cursor):
            raise InvalidRequest("no such cursor", (FieldProblem("/cursor", "no such cursor"),))
        key = self._keys("jobs", tenant)
        while True:
            top = "+inf" if cursor is None else f"({cursor}"
            command = ("ZREVRANGEBYSCORE", key, top, "-inf", "LIMIT", 0, _PAGE, "WITHSCORES")
            [found] = self._link.read(command)
            ids, scores = found[::2], found[1::2]
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
    """Images from index `first` on, of the whole hashes of records and steps."""
    found, at = _by_index(records), _by_index(steps)
    cut_at = None if cut is None else int(cut)
    return [
        image_view(index, request, found.get(index), at.get(index), cut_at)
        for index, request in enumerate(requests, first)
    ]


def _by_index(found: dict[str, str]) -> dict[int, str]:
    return {int(index): value for index, value in found.items()}
