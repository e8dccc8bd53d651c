"""The id of a request: in its answer, and in the log lines of what it did and of its faults."""

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
    """What is logged as JSON, meanwhile."""
    before, handlers = structlog.get_config(), logging.getLogger().handlers[:]
    stream = io.StringIO()
    logs.configure("json", stream)
    yield stream
    structlog.configure(**before)
    logging.getLogger().handlers[:] = handlers


def said(stream: io.StringIO) -> list[dict]:
    """The lines of the service; the test's own client logs too."""
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    return [line for line in lines if line["logger"].startswith("service")]


@pytest.mark.parametrize("path", ["/healthz", "/v1/jobs/none", "/nope", "/docs"])
def test_the_callers_id_comes_back(mill: Deployment, path: str) -> None:
    answer = mill.client.get(path, headers={"X-Request-ID": "order-4711"})
    assert answer.headers.get_list("x-request-id") == ["order-4711"]


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 129, "ä".encode(), "-"])
def test_without_a_usable_one_there_is_another(mill: Deployment, given: object) -> None:
    headers = {} if given is None else {"X-Request-ID": given}
    names = {mill.client.get("/v1/jobs", headers=headers).headers["x-request-id"] for _ in range(2)}
    assert len(names) == 2 and given not in names


def test_a_job_can_be_found_by_the_request_that_made_it(
    mill: Deployment, lines: io.StringIO
) -> None:
    body = {"model": "demo", "prompts": ["a", "b"]}
    answer = mill.client.post("/v1/jobs", json=body, headers={"X-Request-ID": "r-1"})
    job_id = answer.json()["id"]
    mill.client.get(f"/v1/jobs/{job_id}/images/7", headers={"X-Request-ID": "r-2"})
    told = [line for line in said(lines) if line.get("request_id") in ("r-1", "r-2")]
    queued, posted, asked = told
    assert (queued["message"], queued["job"], queued["images"]) == ("job queued", job_id, 2)
    assert (posted["method"], posted["path"], posted["status"]) == ("POST", "/v1/jobs", 202)
    assert (asked["job"], asked["index"], asked["status"]) == (job_id, "7", 404)
    assert all(line["timestamp"] and line["level"] == "info" for line in told)


def test_no_prompt_is_logged(mill: Deployment, lines: io.StringIO) -> None:
    mill.submit("a very secret wish")
    assert "secret" not in lines.getvalue() and said(lines)


def test_a_fault_tells_whose_it_is(
    mill: Deployment, lines: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(mill.store, "workers", broken)
    client = TestClient(mill.client.app, base_url="http://localhost", raise_server_exceptions=False)
    answer = client.get("/v1/workers", headers={"X-Request-ID": "r-3"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "r-3")
    [line] = [line for line in said(lines) if line.get("request_id") == "r-3"]
    assert (line["path"], line["status"]) == ("/v1/workers", 500)


def test_what_watches_all_the_time_is_not_logged(mill: Deployment, lines: io.StringIO) -> None:
    mill.client.get("/healthz")
    assert said(lines) == []
