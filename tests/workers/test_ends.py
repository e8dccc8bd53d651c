"""How a worker ends: by an image that breaks its group, or because it cannot start."""

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


def test_an_image_that_breaks_every_group_fails_alone_in_the_end(
    tmp_path: Path, server: EmbeddedServer, store: Store, model: Model
) -> None:
    """It comes alone after the first time, and what was beside it then is made."""
    requests = [request("poison" if n == 3 else "fine", seed=n, steps=2) for n in range(8)]
    job_id = store.submit(
        [replace(one, model=model.name) for one in requests],
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
        with subprocess.Popen([*command, server.url, str(tmp_path / "data"), model.path]) as one:
            wait_until(lambda process=one: process.poll() is not None or over())
            one.terminate()
        codes.append(one.returncode)
        expire_leases(server.url)
    states = [image.state for image in store.images(job_id)]
    assert states == [State.FAILED if n == 3 else State.SUCCEEDED for n in range(8)]
    assert codes == [EXIT_GROUP_LOST] * 3 + [0]


def test_whatever_a_library_raises_at_the_start_can_be_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Store, model: Model
) -> None:
    def fail(model: Model, device: str) -> None:
        raise KeyError("to_q")

    monkeypatch.setattr("workers.process.worker.load_pipeline", fail)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    settings = WorkerSettings(data=tmp_path / "data")
    assert Worker(model=model, place=Place("cpu"), settings=settings, store=store).run() != 0
    [seen] = store.workers()
    assert (seen.info["state"], seen.info["error"]) == ("failed", "KeyError: 'to_q'")
