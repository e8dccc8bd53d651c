"""A deployment to break: a server, workers that are replaced when they die, and a final audit."""

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import redis

from jobs.errors import Conflict, NotFound, StorageUnavailable
from jobs.image_store import LocalImages
from jobs.job import Job
from jobs.queue.keys import FOREVER, Keys
from jobs.queue.store import Event, Store
from jobs.request import ImageRequest
from jobs.runtime import lifeline
from jobs.runtime.embedded_queue import EmbeddedServer
from tests.jobs.bench import progress_made
from tests.waiting import PATIENCE, wait_until

T = TypeVar("T")


class Deployment:
    """A deployment in one folder. `jobs` maps each acknowledged, undeleted job to its tenant."""

    def __init__(self, folder: Path, workers: int, lease_seconds: float) -> None:
        self._lease_seconds = lease_seconds
        self.folder, self.images = folder, LocalImages(folder / "images")
        self.server = EmbeddedServer.ensure(folder / "queue")
        self.store = Store.connect(self.server.url, timeout=PATIENCE)
        self.jobs: dict[str, str] = {}
        self.counts: Counter[str] = Counter()
        self.children: list[subprocess.Popen[Any]] = []
        for _ in range(workers):
            self.add_worker()

    def add_worker(self) -> None:
        """Start a worker."""
        argv = [sys.executable, "-m", "tests.chaos.worker", self.server.url, uuid4().hex]
        argv += [str(self.folder / "images"), str(self._lease_seconds)]
        self.children.append(lifeline.spawn(argv))

    def replace_dead_workers(self) -> None:
        """Replace dead workers, as a supervisor would."""
        for child in [child for child in self.children if child.poll() is not None]:
            self.children.remove(child)
            self.counts["worker deaths"] += 1
            self.add_worker()

    def insist(self, call: Callable[[], T]) -> T:
        """Repeat the call while the server is unavailable, as an API client may."""

        def attempt() -> tuple[T] | None:
            with suppress(StorageUnavailable):
                return (call(),)
            return None

        return wait_until(attempt)[0]

    def submit(self, prompts: list[str], max_stalls: int = 1000) -> str:
        """Submit a job for a random tenant, and retry until it is acknowledged."""
        requests = [ImageRequest("demo", prompt, 1, 64, 64, 4, 1.0) for prompt in prompts]
        tenant, key = random.choice(["ann", "bob", "cy"]), uuid4().hex
        submitted = self.insist(
            lambda: self.store.submit(
                requests,
                tenant=tenant,
                priority=random.choice([3, 5]),
                idempotency=(key, "body"),
                metadata={},
                spec={},
                quota=10**6,
                keep_seconds=3600,
                max_attempts=1000,
                max_stalls=max_stalls,
            )
        )
        self.jobs[submitted.job_id] = tenant
        self.counts["images"] += len(prompts)
        return submitted.job_id

    # Faults -----------------------------------------------------------------------------------

    def kill_worker(self) -> None:
        """SIGKILL a worker, at any point of its work."""
        random.choice(self.children).kill()
        self.counts["worker kills"] += 1

    def freeze_worker(self, freeze_seconds: float) -> None:
        """Stop a worker for longer than its leases, so that its commits come late."""
        child = random.choice(self.children)
        child.send_signal(signal.SIGSTOP)
        moment = self.store_time() + freeze_seconds
        wait_until(lambda: self.store_time() > moment)
        child.send_signal(signal.SIGCONT)
        self.counts["freezes"] += 1

    def kill_server(self) -> None:
        """SIGKILL the server, and start it again on the same data."""
        os.kill(self.server.pid, signal.SIGKILL)
        self.server.stop()
        self.server = EmbeddedServer.ensure(self.folder / "queue")
        self.counts["server kills"] += 1

    def forget_scripts(self) -> None:
        """Flush the server's scripts, as a failover does."""
        self.insist(lambda: self.store._connection.ask(lambda client: client.script_flush()))
        self.counts["script flushes"] += 1

    def move(self, name: str) -> None:
        """Cancel, retry or delete a random job."""
        if not self.jobs:
            return
        job_id = random.choice(list(self.jobs))
        with suppress(Conflict, NotFound):
            self.insist(lambda: getattr(self.store, name)(job_id, self.jobs[job_id]))
            self.counts[name] += 1
        if name == "delete":
            del self.jobs[job_id]

    def store_time(self) -> float:
        """The server's clock, in seconds."""
        seconds, micro = self.insist(
            lambda: self.store._connection.ask(lambda client: client.time())
        )
        return float(seconds + micro / 1e6)

    # Checks -----------------------------------------------------------------------------------

    def drain(self) -> list[Job]:
        """Wait until every job is finished, and return the jobs."""

        def all_finished() -> list[Job] | None:
            self.replace_dead_workers()
            jobs = [self.insist(lambda j=job_id: self.store.job(j, None)) for job_id in self.jobs]
            return jobs if all(job.state.finished for job in jobs) else None

        jobs = wait_until(all_finished) if self.jobs else []
        for child in self.children:
            child.kill()
            child.wait()
        return jobs

    def close(self) -> None:
        """Stop everything."""
        for child in self.children:
            child.kill()
            child.wait()
        self.store.close()
        self.server.stop()

    def events(self) -> list[Event]:
        """All events since the start."""
        events, after = [], "0-0"
        while page := self.store.events(after, 0):
            events += page
            after = page[-1].id
        return events

    def audit(self, jobs: list[Job]) -> None:
        """Check that no image is lost or committed twice, and that counts and keys agree."""
        committed = [event for event in self.events() if event.type == "image"]
        commits = Counter((event.job_id, event.index) for event in committed)
        assert max(commits.values(), default=0) <= 1, "an image was committed twice"
        for job in jobs:
            images = self.store.images(job.id)
            counted = Counter(str(image.state) for image in images)
            for state in ("queued", "running", "succeeded", "failed", "cancelled"):
                assert getattr(job.counts, state) == counted[state], (job, counted)
            assert job.progress == progress_made(images)
            for image in images:
                is_made = image.state == "succeeded"
                assert commits[job.id, image.index] == is_made
                if image.result is not None:
                    data = self.images.read(image.result.uri)
                    assert sha256(data).hexdigest() == image.result.sha256
        self.check_idle()

    def check_idle(self) -> None:
        """Check that an idle queue holds no key that would stay."""
        with redis.Redis.from_url(self.server.url, decode_responses=True) as raw:
            key = Keys("default")
            for name in ("leases", "quota", "delayed", "depth", "times"):
                assert not raw.exists(key(name)), name
            for name in raw.scan_iter(f"{key.prefix}*", count=1000):
                assert raw.pttl(name) > 0 or name.removeprefix(key.prefix) in FOREVER, name
