"""Jobs of a model without a usable worker: callers get the reason instead of waiting."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.queue.decode import WorkerInfo
from jobs.reports import WorkerReport
from jobs.runtime.embedded_queue import EmbeddedServer
from service.read.standing import standstill
from tests.service.conftest import Deployment, deployed
from tests.waiting import wait_until

MISSING = "model 'demo': the file /models/demo/model_index.json is missing"
REASON = "no worker of model 'demo' can start: the file /models/demo/model_index.json is missing"
BOTH = REASON.replace("start: ", "start: no room; ")


def workers(*reports: tuple[str, str, str | None]) -> list[WorkerInfo]:
    """Workers by model, state and error."""
    return [
        WorkerInfo(str(number), WorkerReport(model, state, error))
        for number, (model, state, error) in enumerate(reports)
    ]


@pytest.mark.parametrize(
    ("reports", "absent", "reason"),
    [
        ([("demo", "failed", MISSING)], 0, REASON),
        ([("demo", "failed", MISSING), ("demo", "failed", MISSING)], 0, REASON),
        ([("demo", "failed", MISSING), ("demo", "failed", "no room")], 0, BOTH),
        ([("demo", "failed", MISSING), ("demo", "starting", None)], 0, None),
        ([("demo", "failed", MISSING), ("demo", "ready", None)], 0, None),
        ([("demo", "draining", None)], 0, None),
        ([("other", "ready", None)], 30, None),
        ([("other", "ready", None)], 31, "no worker of model 'demo' is running"),
        ([], 31, "no worker of model 'demo' is running"),
        ([], 0, None),
        ([("other", "failed", MISSING)], 0, None),
    ],
)
def test_standstill_reasons(
    reports: list[tuple[str, str, str | None]], absent: float, reason: str | None
) -> None:
    assert standstill("demo", workers(*reports), absent, 30) == reason


@pytest.fixture
def deployment(server: EmbeddedServer, tmp_path: Path) -> Iterator[Deployment]:
    """A service whose only worker can't load its model."""
    with deployed(server.url, tmp_path) as started:
        report = WorkerReport("demo", "failed", MISSING)
        started.store.register("broken", report, 600)
        yield started


def recover(deployment: Deployment) -> None:
    """Make the worker ready, and the service aware of it."""
    deployment.store.register("broken", WorkerReport("demo", "ready"), 600)
    wait_until(lambda: deployment.client.get("/readyz").status_code == 200)


def test_job_is_queued_with_a_warning(deployment: Deployment) -> None:
    job = deployment.submit("a circle")
    assert job["warnings"] == [REASON]
    assert job["state"] == "queued"
    response = deployment.client.get(f"/v1/jobs/{job['id']}")
    assert response.json()["warnings"] == [REASON]
    assert deployment.submit("a circle", model="idle")["warnings"] == []
    cancelled = deployment.client.post(f"/v1/jobs/{job['id']}/cancel").json()
    assert (cancelled["state"], cancelled["warnings"]) == ("cancelled", [])


def test_etag_changes_with_the_warning(deployment: Deployment) -> None:
    job = deployment.submit("a circle")
    path = f"/v1/jobs/{job['id']}"
    tag = deployment.client.get(path).headers["ETag"]
    assert deployment.client.get(path, headers={"If-None-Match": tag}).status_code == 304
    recover(deployment)

    def changed() -> dict | None:
        response = deployment.client.get(path, headers={"If-None-Match": tag})
        return response.json() if response.status_code == 200 else None

    assert wait_until(changed)["warnings"] == []


def test_model_without_workers_is_reported(server: EmbeddedServer, tmp_path: Path) -> None:
    with deployed(server.url, tmp_path, absent_seconds=0) as deployment:
        assert deployment.submit("a circle")["warnings"] == ["no worker of model 'demo' is running"]
        response = deployment.client.post("/v1/images/generations", json={"prompt": "a circle"})
        assert response.status_code == 503


IMAGES = {"prompt": "a circle"}


@pytest.mark.parametrize("body", [IMAGES, IMAGES | {"stream": True}], ids=["plain", "stream"])
def test_openai_route_fails_immediately(deployment: Deployment, body: dict) -> None:
    response = deployment.client.post("/v1/images/generations", json=body)
    assert (response.status_code, response.headers["Retry-After"]) == (503, "2")
    error = response.json()["error"]
    assert (error["message"], error["code"]) == (REASON, "not_ready")
    [job] = deployment.client.get("/v1/jobs").json()["data"]
    assert job["state"] == "cancelled"


def test_idempotency_key_keeps_the_job(deployment: Deployment) -> None:
    headers = {"Idempotency-Key": "one"}
    first = deployment.client.post("/v1/images/generations", json=IMAGES, headers=headers)
    assert first.status_code == 503
    [job] = deployment.client.get("/v1/jobs").json()["data"]
    assert job["state"] == "queued"
    deployment.worker.finish_all()
    again = deployment.client.post("/v1/images/generations", json=IMAGES, headers=headers)
    assert (again.status_code, len(again.json()["data"])) == (200, 1)
    assert len(deployment.client.get("/v1/jobs").json()["data"]) == 1


def test_a1111_route_fails_immediately(deployment: Deployment) -> None:
    response = deployment.client.post("/sdapi/v1/txt2img", json=IMAGES)
    assert response.status_code == 503
    assert response.headers["Content-Type"] == "application/problem+json"
    assert (response.json()["type"], response.json()["detail"]) == (
        "urn:imagemill:problem:not-ready",
        REASON,
    )
    [job] = deployment.client.get("/v1/jobs").json()["data"]
    assert job["state"] == "cancelled"


def test_readyz_gives_the_same_reason(deployment: Deployment) -> None:
    response = deployment.client.get("/readyz")
    assert response.status_code == 503
    assert MISSING in response.json()["detail"]
