"""Shorthand for the queue's tests: submit, claim, commit, and moving time forward.

Time is the server's and can't be changed. A test that needs a lease to have expired, an image to
have waited or a job to be old therefore moves the deadline that the server stores.
"""

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import redis

from jobs.job import ImageResult, ImageView, Lease
from jobs.queue.connection import _source
from jobs.queue.keys import Keys
from jobs.queue.store import Store
from jobs.request import ImageRequest

MODEL = "demo"

AGE = """
local now = redis.call('TIME')
local ms = now[1] * 1000 + math.floor(now[2] / 1000)
redis.call('HSET', KEYS[1], 'at', ms - tonumber(ARGV[1]))
"""


def request(**changes: Any) -> ImageRequest:
    """A small request; always the same one except for `changes`."""
    values = {"model": MODEL, "prompt": "a red square", "seed": 7, "width": 128, "height": 128}
    return ImageRequest(**{**values, "steps": 8, "guidance_scale": 2.5, **changes})


def result(lease: Lease) -> ImageResult:
    """What a worker would commit for the lease."""
    uri = f"{lease.job_id}/{lease.index}.{lease.token}.png"
    return ImageResult(uri, "0" * 64, 1234, "image/png", 0.5)


def expire_leases(url: str, pool: str = "default") -> None:
    """Let every lease of the pool expire, as those of a dead worker would."""
    with redis.Redis.from_url(url, decode_responses=True, protocol=2) as raw:
        leases = Keys(pool)("leases")
        for image in raw.zrange(leases, 0, -1):
            raw.zadd(leases, {image: 1}, xx=True)


class Bench:
    """A store, its raw connection, and shorthand for the moves."""

    def __init__(self, store: Store, raw: "redis.Redis", pool: str) -> None:
        self.store, self.raw, self.key = store, raw, Keys(pool)

    def submit(
        self, images: int | Sequence[ImageRequest] = 1, tenant: str = "ann", **options: Any
    ) -> str:
        """Submit this many equal images, or these requests; returns the job id."""
        requests = [request() for _ in range(images)] if isinstance(images, int) else images
        values = {"priority": 5, "metadata": {}, "spec": {}, "quota": 10**6, "keep_seconds": 3600}
        values |= {"max_attempts": 3, **options}
        return self.store.submit(requests, tenant=tenant, **values).job_id

    def claim(self, limit: int = 1, worker: str = "w1", **options: Any) -> list[Lease]:
        """Claim with a fresh nonce; the worker holds everything that it leased before."""
        values = {"lease_seconds": 60, "nonce": uuid4().hex, "held": self.held(worker), **options}
        return self.store.claim(values.pop("model", MODEL), worker, limit=limit, **values)

    def held(self, worker: str) -> list[str]:
        """The images of the worker's last claim, so that the next one gives nothing back."""
        return self.raw.lrange(self.key("claimed", worker), 1, -1)[::2]

    def claim_one(self, **options: Any) -> Lease:
        """Claim one image; fails if none is ready."""
        [lease] = self.claim(1, **options)
        return lease

    def order(self, images: int) -> list[tuple[str, int]]:
        """(job, index) of the next images, in the order in which they are claimed one by one."""
        leases = [self.claim_one(worker=uuid4().hex) for _ in range(images)]
        return [(lease.job_id, lease.index) for lease in leases]

    def commit(self, *leases: Lease) -> list[str]:
        """Commit these leases."""
        return self.store.commit([(lease, result(lease)) for lease in leases])

    def make_all(self) -> int:
        """Claim and commit until nothing is ready; returns the number of images."""
        count = 0
        while leases := self.claim(100, held=()):
            self.commit(*leases)
            count += len(leases)
        return count

    def lose(self, *leases: Lease) -> None:
        """Let the leases expire."""
        for lease in leases:
            self.raw.zadd(self.key("leases"), {lease.key: 1})

    def sweep_after(self, seconds: float) -> int:
        """Sweep as if the last sweep was exactly this long ago; returns how many images moved."""
        with self.raw.pipeline(transaction=True) as pipeline:
            pipeline.eval(AGE, 1, self.key("swept"), round(seconds * 1000))
            pipeline.eval(_source("sweep")[0], 1, self.key.prefix, 256)
            return int(pipeline.execute()[1])

    def states(self, job_id: str) -> list[str]:
        """The states of a job's images, by index."""
        return [str(image.state) for image in self.store.images(job_id)]

    def counts(self, job_id: str) -> dict[str, int]:
        """The job's counts that aren't zero, without the total."""
        counts = self.store.job(job_id, None).counts
        names = ("queued", "running", "succeeded", "failed", "cancelled")
        return {name: getattr(counts, name) for name in names if getattr(counts, name)}

    def quota(self, tenant: str = "ann") -> int:
        """The tenant's unfinished images."""
        return int(self.raw.hget(self.key("quota"), tenant) or 0)

    def clear(self) -> None:
        """Delete everything in the pool."""
        for name in self.all_keys():
            self.raw.unlink(self.key.prefix + name)

    def all_keys(self) -> set[str]:
        """All keys of the pool, without the prefix."""
        names = self.raw.scan_iter(f"{self.key.prefix}*", count=1000)
        return {name.removeprefix(self.key.prefix) for name in names}


def progress_made(images: list[ImageView]) -> float:
    """The progress of a finished job: cancelled images count as far as they came."""
    total = sum(image.request.steps for image in images)
    made = sum(
        min(image.step, image.request.steps) if image.state == "cancelled" else image.request.steps
        for image in images
    )
    return made / total
