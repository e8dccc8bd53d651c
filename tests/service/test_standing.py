"""Jobs of a model that no worker can serve: callers hear why, and nobody waits for nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.queue.decode import WorkerInfo
from jobs.runtime.embedded_queue import EmbeddedServer
from service.read.standing import standstill
from tests.service.conftest import Deployment, deployed
from tests.waiting import wait_until

MISSING = "model 'demo': the file /models/demo/model_index.json is missing"
REASON = "no worker of model 'demo' can start: the file /models/demo/model_index.json is missing"
BOTH = REASON.replace("start: ", "start: no room; ")


def workers(*told: tuple[str, str, str | None]) -> list[WorkerInfo]:
    """Workers by model, state and error."""
    return [
        WorkerInfo(str(number), {"model": model, "state": state, "error": error})
        for number, (model, state, error) in enumerate(told)
    ]


@pytest.mark.parametrize(
    ("told", "absent", "reason"),
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
def test_why_a_model_stands_still(
    told: list[tuple[str, str, str | None]], absent: float, reason: str | None
) -> None:
    assert standstill("demo", workers(*told), absent, 30) == reason


@pytest.fixture
def mill(server: EmbeddedServer, tmp_path: Path) -> Iterator[Deployment]:
    """A service whose one worker cannot load its model."""
    with deployed(server.url, tmp_path) as found:
        found.store.register("broken", {"model": "demo", "state": "failed", "error": MISSING}, 600)
        yield found


def recover(mill: Deployment) -> None:
    """The worker is ready after all, and the service knows."""
    mill.store.register("broken", {"model": "demo", "state": "ready", "error": None}, 600)
    wait_until(lambda: mill.client.get("/readyz").status_code == 200)


def test_a_job_is_queued_with_a_warning(mill: Deployment) -> None:
    job = mill.submit("a circle")
    assert job["warnings"] == [REASON]
    assert job["state"] == "queued"
    answer = mill.client.get(f"/v1/jobs/{job['id']}")
    assert answer.json()["warnings"] == [REASON]
    assert mill.submit("a circle", model="idle")["warnings"] == []
    cancelled = mill.client.post(f"/v1/jobs/{job['id']}/cancel").json()
    assert (cancelled["state"], cancelled["warnings"]) == ("cancelled", [])


def test_the_tag_changes_with_the_warning(mill: Deployment) -> None:
    job = mill.submit("a circle")
    path = f"/v1/jobs/{job['id']}"
    tag = mill.client.get(path).headers["ETag"]
    assert mill.client.get(path, headers={"If-None-Match": tag}).status_code == 304
    recover(mill)

    def changed() -> dict | None:
        answer = mill.client.get(path, headers={"If-None-Match": tag})
        return answer.json() if answer.status_code == 200 else None

    assert wait_until(changed)["warnings"] == []


def test_a_model_without_any_worker_is_named(server: EmbeddedServer, tmp_path: Path) -> None:
    with deployed(server.url, tmp_path, absent_seconds=0) as mill:
        assert mill.submit("a circle")["warnings"] == ["no worker of model 'demo' is running"]
        answer = mill.client.post("/v1/images/generations", json={"prompt": "a circle"})
        assert answer.status_code == 503


IMAGES = {"prompt": "a circle"}


@pytest.mark.parametrize("body", [IMAGES, IMAGES | {"stream": True}], ids=["plain", "stream"])
def test_openais_route_answers_at_once(mill: Deployment, body: dict) -> None:
    answer = mill.client.post("/v1/images/generations", json=body)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
    error = answer.json()["error"]
    assert (error["message"], error["code"]) == (REASON, "not_ready")
    [job] = mill.client.get("/v1/jobs").json()["data"]
    assert job["state"] == "cancelled"


def test_a_caller_who_comes_again_keeps_the_job(mill: Deployment) -> None:
    headers = {"Idempotency-Key": "one"}
    first = mill.client.post("/v1/images/generations", json=IMAGES, headers=headers)
    assert first.status_code == 503
    [job] = mill.client.get("/v1/jobs").json()["data"]
    assert job["state"] == "queued"
    mill.worker.finish_all()
    again = mill.client.post("/v1/images/generations", json=IMAGES, headers=headers)
    assert (again.status_code, len(again.json()["data"])) == (200, 1)
    assert len(mill.client.get("/v1/jobs").json()["data"]) == 1


def test_a1111s_route_answers_at_once(mill: Deployment) -> None:
    answer = mill.client.post("/sdapi/v1/txt2img", json=IMAGES)
    assert answer.status_code == 503
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert (answer.json()["type"], answer.json()["detail"]) == (
        "urn:imagemill:problem:not-ready",
        REASON,
    )
    [job] = mill.client.get("/v1/jobs").json()["data"]
    assert job["state"] == "cancelled"


def test_readyz_tells_the_same(mill: Deployment) -> None:
    answer = mill.client.get("/readyz")
    assert answer.status_code == 503
    assert MISSING in answer.json()["detail"]
