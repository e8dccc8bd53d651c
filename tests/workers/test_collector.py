"""What the collector removes, and failures that don't block it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobs.errors import StorageUnavailable
from jobs.image_store import LocalImages
from jobs.queue.store import Store
from tests.waiting import PATIENCE, wait_until
from tests.workers.conftest import request
from workers.collector import Collector


@pytest.fixture
def images(tmp_path: Path) -> LocalImages:
    return LocalImages(tmp_path / "images")


@contextmanager
def collecting(
    store: Store, images: LocalImages, monkeypatch: pytest.MonkeyPatch
) -> Iterator[threading.Thread]:
    """Run a collector without pauses, on its own thread."""
    monkeypatch.setattr("workers.collector.LOOK_SECONDS", 0.001)
    collector = Collector(store, images)
    thread = threading.Thread(target=collector.run)
    thread.start()
    try:
        yield thread
    finally:
        collector.stop()
        thread.join(PATIENCE)
    assert not thread.is_alive()


def deleted(store: Store, images: LocalImages, count: int) -> list[str]:
    """Submit and delete jobs with one file each."""
    jobs = []
    for _ in range(count):
        jobs.append(
            store.submit(
                [request()],
                tenant="t",
                priority=5,
                metadata={},
                spec={},
                quota=1000,
                keep_seconds=60,
                max_attempts=1,
            ).job_id
        )
        images.write(jobs[-1], 0, "token", b"bytes", ".png")
        store.delete(jobs[-1], None)
    return jobs


def left(tmp_path: Path) -> set[str]:
    """The jobs that have files."""
    return {folder.name for folder in (tmp_path / "images").iterdir()}


def test_undeletable_folder_does_not_block_others(
    store: Store, images: LocalImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubborn, *_ = sorted(deleted(store, images, 5))
    remove = images.remove_job
    refused = threading.Event()

    def remove_most(job_id: str) -> None:
        if job_id == stubborn:
            refused.set()
            raise StorageUnavailable("Directory not empty")
        remove(job_id)

    monkeypatch.setattr(images, "remove_job", remove_most)
    with collecting(store, images, monkeypatch):
        wait_until(lambda: left(tmp_path) == {stubborn} and refused.is_set())
        later = deleted(store, images, 1)
        wait_until(lambda: not left(tmp_path) & set(later))


def test_collected_jobs_are_forgotten(
    store: Store, images: LocalImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [job_id] = deleted(store, images, 1)
    forgotten = []
    forget = store.forget
    monkeypatch.setattr(store, "forget", lambda job_id: (forget(job_id), forgotten.append(job_id)))
    with collecting(store, images, monkeypatch):
        wait_until(lambda: forgotten == [job_id])
    assert left(tmp_path) == set()


def test_collector_survives_a_queue_outage(
    store: Store, images: LocalImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deleted(store, images, 1)
    refusals, due = iter(range(3)), store.due

    def due_later(limit: int) -> list[str]:
        if next(refusals, None) is not None:
            raise StorageUnavailable("away")
        return due(limit)

    monkeypatch.setattr(store, "due", due_later)
    with collecting(store, images, monkeypatch):
        wait_until(lambda: left(tmp_path) == set())


def test_collector_stops_between_jobs(
    store: Store, images: LocalImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = deleted(store, images, 3)
    remove = images.remove_job
    collector = Collector(store, images)

    def remove_and_stop(job_id: str) -> None:
        remove(job_id)
        collector.stop()

    monkeypatch.setattr("workers.collector.LOOK_SECONDS", 0.001)
    monkeypatch.setattr(images, "remove_job", remove_and_stop)
    collector.run()
    assert len(left(tmp_path)) == len(jobs) - 1
