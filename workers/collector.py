"""Removes the files of expired and deleted jobs, then their last entry in the queue.

Runs on its own thread, because a job may have ten thousand files and leases must not expire while
they're removed. The API no longer serves these jobs, so it can stop at any point: a job that isn't
forgotten is due again a minute later, for any worker.
"""

import threading

import structlog

from jobs.errors import StorageUnavailable
from jobs.image_store import LocalImages
from jobs.queue.store import Store

log = structlog.get_logger(__name__)

LOOK_SECONDS = 2.0
"""Seconds between checks for jobs whose files can be removed."""

COLLECTED_AT_ONCE = 16
"""Most jobs to collect per check."""


class Collector:
    """Collects until `stop`; failures of the queue or the disk are retried later."""

    def __init__(self, store: Store, images: LocalImages) -> None:
        self._store, self._images = store, images
        self._stop = threading.Event()

    def stop(self) -> None:
        """End `run` after the current job."""
        self._stop.set()

    def run(self) -> None:
        """Check for jobs and collect them until stopped."""
        while not self._stop.wait(LOOK_SECONDS):
            try:
                due = self._store.due(COLLECTED_AT_ONCE)
            except StorageUnavailable as error:
                log.warning("queue unavailable", reason=str(error))
                continue
            for job_id in due:
                if self._stop.is_set():
                    return
                self._collect(job_id)

    def _collect(self, job_id: str) -> None:
        try:
            self._images.remove_job(job_id)
            self._store.forget(job_id)
        except StorageUnavailable as error:
            log.warning("couldn't remove a job's files", job=job_id, reason=str(error))
