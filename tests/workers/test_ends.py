"""How a worker exits: an image breaks its group, or it can't start."""

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.catalog import Model
from jobs.job import State
from jobs.queue.store import Store
from jobs.runtime.embedded_queue import EmbeddedServer
from tests.jobs.bench import expire_leases
from tests.waiting import wait_until
from tests.workers.conftest import request
from workers.process.launch import EXIT_GROUP_LOST, Place
from workers.process.worker import Worker
from workers.settings import WorkerSettings


def test_image_that_breaks_every_group_fails_alone(
    tmp_path: Path, server: EmbeddedServer, store: Store, model: Model
) -> None:
    """After the first time it runs alone, so the images that ran with it succeed."""
    requests = [request("poison" if n == 3 else "fine", seed=n, steps=2) for n in range(8)]
    job_id = store.submit(
        [replace(request, model=model.name) for request in requests],
        tenant="t",
        priority=5,
        metadata={},
        spec={},
        quota=100,
        keep_seconds=3600,
        max_attempts=1,
        max_stalls=2,
    ).job_id

    def over() -> bool:
        return store.job(job_id, None).state.finished

    command = [sys.executable, "-m", "tests.workers.breakable"]
    codes = []
    while not over():
        with subprocess.Popen([*command, server.url, str(tmp_path / "data"), model.path]) as worker:
            wait_until(lambda process=worker: process.poll() is not None or over())
            worker.terminate()
        codes.append(worker.returncode)
        expire_leases(server.url)
    states = [image.state for image in store.images(job_id)]
    assert states == [State.FAILED if n == 3 else State.SUCCEEDED for n in range(8)]
    assert codes == [EXIT_GROUP_LOST] * 3 + [0]


def test_any_startup_error_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Store, model: Model
) -> None:
    def fail(model: Model, device: str) -> None:
        raise KeyError("to_q")

    monkeypatch.setattr("workers.process.worker.load_pipeline", fail)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    settings = WorkerSettings(data=tmp_path / "data")
    assert Worker(model=model, place=Place("cpu"), settings=settings, store=store).run() != 0
    [worker] = store.workers()
    assert (worker.report.state, worker.report.error) == ("failed", "KeyError: 'to_q'")
