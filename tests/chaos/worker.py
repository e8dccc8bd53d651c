"""A worker that draws nothing, to be killed by the tests.

Run it as `python -m tests.chaos.worker URL NAME FOLDER LEASE_SECONDS`.

It claims batches, beats from a thread, "draws" for some milliseconds, writes a file and commits. A
prompt that contains "poison" kills the process. The worker ends with the test.
"""

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from jobs.errors import StorageUnavailable
from jobs.image_store import LocalImages
from jobs.job import ImageResult, Lease
from jobs.queue.store import Store
from jobs.runtime import lifeline
from tests.waiting import PATIENCE

T = TypeVar("T")
BATCH = 8


def patiently(call: Callable[[], T]) -> T:
    """Repeat the call while the queue is unavailable, as a worker does."""
    while True:
        try:
            return call()
        except StorageUnavailable:
            time.sleep(0.02)


class Worker:
    """A process's leases, and the heartbeat that extends them."""

    def __init__(self, url: str, name: str, folder: Path, lease_seconds: float) -> None:
        self._lease_seconds = lease_seconds
        self.store = patiently(lambda: Store.connect(url, timeout=PATIENCE))
        self.images = LocalImages(folder)
        self.name = name
        self.leases: dict[str, Lease] = {}
        self.lock = threading.Lock()

    def beat(self) -> None:
        """Extend the leases until the process ends; drop those that are lost or cancelled."""
        while True:
            with self.lock:
                steps = {(lease.key, lease.token): 1 for lease in self.leases.values()}
            with suppress(StorageUnavailable):
                beat = self.store.beat(self.name, steps, self._lease_seconds)
                with self.lock:
                    for key in beat.lost | beat.cancelled:
                        self.leases.pop(key, None)
            time.sleep(self._lease_seconds / 5)

    def run_batch(self) -> None:
        """Claim and make one batch."""
        nonce = uuid4().hex
        leases = patiently(
            lambda: self.store.claim(
                "demo",
                self.name,
                limit=random.randint(1, BATCH),
                lease_seconds=self._lease_seconds,
                nonce=nonce,
                held=list(self.leases),
            )
        )
        with self.lock:
            self.leases |= {lease.key: lease for lease in leases}
        for lease in leases:
            self.draw(lease)
            with self.lock:
                self.leases.pop(lease.key, None)
        patiently(self.store.sweep)
        if not leases:
            patiently(lambda: self.store.wait("demo", 0.1))

    def draw(self, lease: Lease) -> None:
        """Make one image, fail it, give it back, or die of it."""
        time.sleep(random.uniform(0, 0.01))
        if "poison" in lease.request.prompt:
            os.kill(os.getpid(), signal.SIGKILL)
        fate = random.random()
        if fate < 0.02:
            patiently(lambda: self.store.fail(lease, "bad luck", again=True, delay_seconds=0.05))
        elif fate < 0.04:
            patiently(lambda: self.store.release([lease]))
        else:
            data = f"{lease.key} {lease.token}".encode()
            uri = self.images.write(lease.job_id, lease.index, lease.token, data, ".png")
            result = ImageResult(uri, sha256(data).hexdigest(), len(data), "image/png", 0.01)
            patiently(lambda: self.store.commit([(lease, result)]))


def main() -> None:
    """Work until the test ends."""
    lifeline.watch(lambda: os._exit(0))
    worker = Worker(sys.argv[1], sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]))
    threading.Thread(target=worker.beat, daemon=True).start()
    while True:
        worker.run_batch()


if __name__ == "__main__":
    main()
