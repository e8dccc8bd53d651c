"""Removes the files of expired and deleted jobs, then their last trace in the queue.

On a thread of its own: a job may have ten thousand files, and no lease may run out over them. What
it is told to remove nobody can read any more, so that it may stop at any point: a job that is not
forgotten comes again a minute later, to whichever worker looks then.
"""

import threading

import structlog

from jobs.errors import StorageUnavailable
from jobs.image_store import LocalImages
from jobs.queue.store import Store

log = structlog.get_logger(__name__)

LOOK_SECONDS = 2.0
"""Seconds between two looks for jobs whose files can go."""

COLLECTED_AT_ONCE = 16
"""Jobs whose files one look removes."""


class Collector:
    """Collects until `stop`; a queue or a folder that refuses is tried again later."""

    def __init__(self, store: Store, images: LocalImages) -> None:
        self._store, self._images = store, images
        self._stop = threading.Event()

    def stop(self) -> None:
        """End `run` after the job in progress."""
        self._stop.set()

    def run(self) -> None:
        """Look and collect until stopped."""
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
            log.warning("cannot remove a job's files yet", job=job_id, reason=str(error))
