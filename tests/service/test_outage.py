"""Short outages of the queue, as seen by callers whose requests wait for images."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import httpx
import pytest
from structlog.testing import capture_logs

from jobs.errors import QuotaExceeded, StorageUnavailable
from jobs.runtime.embedded_queue import EmbeddedServer
from service.openai import batch_validation, stream
from service.read import long_poll
from tests import web
from tests.service.conftest import Deployment, deployed
from tests.service.live import leaving, listening
from tests.waiting import PATIENCE, wait_until

STREAM = {"stream": True, "partial_images": 1}
IMAGES, TXT2IMG = "/v1/images/generations", "/sdapi/v1/txt2img"


@pytest.fixture
def live(
    server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Deployment]:
    """A service that listens on a port and polls its jobs all the time."""
    for module in (long_poll, stream):
        monkeypatch.setattr(module, "RECHECK_SECONDS", 0.02)
    with (
        deployed(server.url, tmp_path, start=False, sync_seconds=PATIENCE) as service,
        listening(service.client.app) as address,
        web.Client(base_url=address, timeout=PATIENCE) as client,
    ):
        service.client = client
        yield service


class Outage:
    """Whether the outage is over, and how often each method was called during it."""

    def __init__(self) -> None:
        self.met = Counter[str]()
        self.over = threading.Event()

    def check(self, method: str) -> None:
        if not self.over.is_set():
            self.met[method] += 1
            raise StorageUnavailable("the queue server cannot be reached")

    def before(self, name: str, method: Callable) -> Callable:
        def call(*args: object, **more: object) -> object:
            self.check(name)
            return method(*args, **more)

        return call


@contextmanager
def away(deployment: Deployment, *names: str) -> Iterator[Outage]:
    """These methods of the service's store fail until the outage is over."""
    outage = Outage()
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(
                deployment.store, name, outage.before(name, getattr(deployment.store, name))
            )
        yield outage


def jobs(deployment: Deployment) -> list[str]:
    """The states of all jobs."""
    return [job.state for job in deployment.store.jobs("local")[0]]


@pytest.mark.parametrize(
    ("path", "more", "method"),
    [
        (IMAGES, {}, "job_and_images"),
        (TXT2IMG, {}, "job_and_images"),
        (IMAGES, STREAM, "job"),
        (IMAGES, STREAM, "images"),
    ],
)
def test_open_request_survives_an_outage(
    live: Deployment, path: str, more: dict, method: str
) -> None:
    with away(live, method) as outage, ThreadPoolExecutor(1) as pool:
        waits = pool.submit(live.client.post, path, json={"prompt": "a", **more})
        (lease,) = wait_until(live.worker.claim)
        live.worker.finish(lease)
        wait_until(lambda: outage.met[method] > 1)
        outage.over.set()
        response = waits.result()
    assert response.status_code == 200, response.text
    assert '"error"' not in response.text
    assert jobs(live) == ["succeeded"]


def test_stream_loses_no_image_in_an_outage(live: Deployment) -> None:
    body = {"prompt": "a", "n": 2, **STREAM}
    with away(live, "want_preview") as outage, ThreadPoolExecutor(1) as pool:
        waits = pool.submit(live.client.post, IMAGES, json=body)
        first, second = wait_until(lambda: live.worker.claim(2))
        live.worker.finish(first)
        met = outage.met["want_preview"]
        wait_until(lambda: outage.met["want_preview"] > met + 1)
        outage.over.set()
        live.worker.finish(second)
        text = waits.result().text
    assert text.count("event: image_generation.completed") == 2


@pytest.mark.parametrize("more", [{}, STREAM])
def test_disconnect_during_an_outage_cancels_the_job(live: Deployment, more: dict) -> None:
    with away(live, "job", "images", "job_and_images", "cancel") as outage:
        with leaving(str(live.client.base_url), IMAGES, {"prompt": "a", **more}):
            wait_until(lambda: jobs(live))
        wait_until(lambda: outage.met["cancel"] > 1)
        outage.over.set()
        wait_until(lambda: jobs(live) == ["cancelled"])


@pytest.mark.parametrize("more", [{}, STREAM])
def test_outage_longer_than_the_timeout_is_504(
    server: EmbeddedServer, tmp_path: Path, more: dict
) -> None:
    with (
        deployed(server.url, tmp_path, sync_seconds=0.1) as deployment,
        away(deployment, "job", "images", "job_and_images", "cancel"),
        capture_logs() as lines,
    ):
        response = deployment.client.post(IMAGES, json={"prompt": "a", **more})
        if more:
            assert "took_too_long" in response.text
        else:
            assert (response.status_code, response.headers["x-should-retry"]) == (504, "false")
            assert "cannot be reached" in response.json()["error"]["message"]
    warnings = [line for line in lines if line["event"].startswith("a job that nobody waits for")]
    assert len(warnings) == 1


@pytest.fixture
def input_file(live: Deployment) -> str:
    """The id of an input file for a batch of three jobs."""
    lines = [
        {
            "custom_id": str(priority),
            "method": "POST",
            "url": IMAGES,
            "body": {"prompt": "a", "priority": priority},
        }
        for priority in range(3)
    ]
    text = "\n".join(map(json.dumps, lines))
    response = live.client.post("/v1/files", files={"file": text}, data={"purpose": "batch"})
    return response.json()["id"]


def begin(deployment: Deployment, input_file: str) -> httpx.Response:
    body = {"input_file_id": input_file, "endpoint": IMAGES, "completion_window": "24h"}
    return deployment.client.post("/v1/batches", json=body)


def test_batch_cancel_survives_an_outage(live: Deployment, input_file: str) -> None:
    path = f"/v1/batches/{begin(live, input_file).json()['id']}"
    wait_until(lambda: live.client.get(path).json()["status"] == "in_progress")
    with away(live, "cancel") as outage:
        assert live.client.post(f"{path}/cancel").status_code == 503
        assert live.client.get(path).status_code == 503
        outage.over.set()
        assert live.client.get(path).json()["status"] == "cancelled"
    assert jobs(live) == ["cancelled"] * 3


def failing_at(turn: int, method: Callable, kind: type[Exception] = StorageUnavailable) -> Callable:
    """The method, but call number `turn` fails."""
    calls = count(1)

    def call(*args: object, **more: object) -> object:
        if next(calls) == turn:
            raise kind(f"the queue is away at {turn}")
        return method(*args, **more)

    return call


def test_failed_batch_deletes_the_jobs_it_can(
    live: Deployment, input_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method, turn, kind in (("submit", 3, QuotaExceeded), ("delete", 1, StorageUnavailable)):
        failing = failing_at(turn, getattr(live.store, method), kind)
        monkeypatch.setattr(live.store, method, failing)
    path = f"/v1/batches/{begin(live, input_file).json()['id']}"
    failed = wait_until(
        lambda: (seen := live.client.get(path).json())["status"] == "failed" and seen
    )
    assert "away at 3" in failed["errors"]["data"][0]["message"]
    assert len(jobs(live)) == 1


def test_batch_is_queued_once_in_spite_of_an_outage(
    live: Deployment, input_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_validation, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(live.store, "submit", failing_at(3, live.store.submit))
    path = f"/v1/batches/{begin(live, input_file).json()['id']}"
    wait_until(lambda: live.client.get(path).json()["status"] == "in_progress")
    assert jobs(live) == ["queued"] * 3
    assert len(live.client.get(path).json()["jobs"]) == 3
