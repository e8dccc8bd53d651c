"""Request ids: in responses, log lines and logged errors."""

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog
from starlette.testclient import TestClient

from jobs.runtime import logs
from tests.service.conftest import Deployment


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """The JSON log lines during the test."""
    before, handlers = structlog.get_config(), logging.getLogger().handlers[:]
    stream = io.StringIO()
    logs.configure("json", stream)
    yield stream
    structlog.configure(**before)
    logging.getLogger().handlers[:] = handlers


def logged(stream: io.StringIO) -> list[dict]:
    """The service's log lines; the test's own client logs too."""
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    return [line for line in lines if line["logger"].startswith("service")]


@pytest.mark.parametrize("path", ["/healthz", "/v1/jobs/none", "/nope", "/docs"])
def test_caller_id_is_returned(deployment: Deployment, path: str) -> None:
    response = deployment.client.get(path, headers={"X-Request-ID": "order-4711"})
    assert response.headers.get_list("x-request-id") == ["order-4711"]


@pytest.mark.parametrize("header", [None, "", "a b", "x" * 129, "ä".encode(), "-"])
def test_unusable_id_is_replaced(deployment: Deployment, header: object) -> None:
    headers = {} if header is None else {"X-Request-ID": header}
    names = {
        deployment.client.get("/v1/jobs", headers=headers).headers["x-request-id"] for _ in range(2)
    }
    assert len(names) == 2 and header not in names


def test_job_log_line_has_the_request_id(deployment: Deployment, lines: io.StringIO) -> None:
    body = {"model": "demo", "prompts": ["a", "b"]}
    response = deployment.client.post("/v1/jobs", json=body, headers={"X-Request-ID": "r-1"})
    job_id = response.json()["id"]
    deployment.client.get(f"/v1/jobs/{job_id}/images/7", headers={"X-Request-ID": "r-2"})
    entries = [line for line in logged(lines) if line.get("request_id") in ("r-1", "r-2")]
    queued, posted, asked = entries
    assert (queued["message"], queued["job"], queued["images"]) == ("job queued", job_id, 2)
    assert (posted["method"], posted["path"], posted["status"]) == ("POST", "/v1/jobs", 202)
    assert (asked["job"], asked["index"], asked["status"]) == (job_id, "7", 404)
    assert all(line["timestamp"] and line["level"] == "info" for line in entries)


def test_prompts_are_not_logged(deployment: Deployment, lines: io.StringIO) -> None:
    deployment.submit("a very secret wish")
    assert "secret" not in lines.getvalue() and logged(lines)


def test_internal_error_has_the_request_id(
    deployment: Deployment, lines: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(deployment.store, "workers", broken)
    client = TestClient(
        deployment.client.app, base_url="http://localhost", raise_server_exceptions=False
    )
    response = client.get("/v1/workers", headers={"X-Request-ID": "r-3"})
    assert (response.status_code, response.headers["x-request-id"]) == (500, "r-3")
    [line] = [line for line in logged(lines) if line.get("request_id") == "r-3"]
    assert (line["path"], line["status"]) == ("/v1/workers", 500)


def test_monitoring_requests_are_not_logged(deployment: Deployment, lines: io.StringIO) -> None:
    deployment.client.get("/healthz")
    assert logged(lines) == []
