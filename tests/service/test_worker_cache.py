"""The worker cache: one read for many callers, and no waiting during a refresh."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from jobs.queue.decode import WorkerInfo
from jobs.reports import WorkerReport
from service.read import worker_cache
from service.read.worker_cache import RecentWorkers
from tests.waiting import PATIENCE


class Asked:
    """A fake store; `held` delays its responses."""

    def __init__(self) -> None:
        self.times = 0
        self.asking, self.held = threading.Event(), threading.Event()
        self.held.set()

    def workers(self) -> list[WorkerInfo]:
        self.times += 1
        self.asking.set()
        assert self.held.wait(PATIENCE)
        return [WorkerInfo(f"w{self.times}", WorkerReport())]


@pytest.fixture
def store() -> Any:
    return Asked()


def names(workers: RecentWorkers) -> list[str]:
    return [worker.id for worker in workers.all()]


def test_first_callers_share_one_read(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_cache, "SECONDS", PATIENCE)
    workers = RecentWorkers(store)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(names, [workers] * 8)) == [["w1"]] * 8
    assert store.times == 1


def test_others_get_cached_workers_during_a_refresh(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_cache, "SECONDS", 0.0)
    workers = RecentWorkers(store)
    assert names(workers) == ["w1"]
    store.asking.clear()
    store.held.clear()
    with ThreadPoolExecutor(1) as pool:
        fresh = pool.submit(names, workers)
        assert store.asking.wait(PATIENCE)
        assert names(workers) == ["w1"]
        store.held.set()
        assert fresh.result() == ["w2"]


def test_failed_read_is_retried(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = RecentWorkers(store)
    with monkeypatch.context() as away:
        away.setattr(store, "workers", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            workers.all()
    assert names(workers) == ["w1"]
