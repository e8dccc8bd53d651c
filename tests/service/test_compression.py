"""Compression of large JSON and text, for callers that accept it."""

import gzip
import json

import pytest
from starlette.testclient import TestClient

from service.http.compression import SMALLEST_BYTES
from tests.service.conftest import Deployment, working

GZIP = {"Accept-Encoding": "gzip"}
PLAIN = {"Accept-Encoding": "identity"}


def raw(client: TestClient, path: str, **headers: str) -> tuple[dict[str, str], bytes]:
    """The headers and the bytes as sent."""
    with client.stream("GET", path, headers=headers) as response:
        return dict(response.headers), b"".join(response.iter_raw())


@pytest.fixture(scope="module")
def job_path(deployment: Deployment) -> str:
    """A finished job whose JSON is large."""
    job = deployment.submit("a", n=20)
    deployment.worker.finish_all()
    return job["urls"]["self"]


def test_large_json_is_compressed_on_request(deployment: Deployment, job_path: str) -> None:
    headers, body = raw(deployment.client, job_path, **GZIP)
    plain_headers, plain = raw(deployment.client, job_path, **PLAIN)
    assert headers["content-encoding"] == "gzip"
    assert int(headers["content-length"]) == len(body) < len(plain) / 3
    assert json.loads(gzip.decompress(body)) == json.loads(plain)
    assert "content-encoding" not in plain_headers
    for sent in (headers, plain_headers):
        assert "Accept-Encoding" in sent["vary"]


def test_quality_zero_is_a_refusal(deployment: Deployment, job_path: str) -> None:
    for asked, encoding in (
        ("gzip;q=0, br", None),
        ("gzip; q=0.0", None),
        ("gzip;q=0.5", "gzip"),
        ("br, gzip", "gzip"),
    ):
        headers, _ = raw(deployment.client, job_path, **{"Accept-Encoding": asked})
        assert headers.get("content-encoding") == encoding, asked


def test_small_json_is_not(deployment: Deployment) -> None:
    headers, body = raw(deployment.client, "/healthz", **GZIP)
    assert "content-encoding" not in headers and len(body) < SMALLEST_BYTES


def test_images_and_archives_are_not(deployment: Deployment, job_path: str) -> None:
    for name in ("images/0", "images/0/thumbnail", "images.zip", "sheet.png"):
        headers, body = raw(deployment.client, f"{job_path}/{name}", **GZIP)
        assert "content-encoding" not in headers, name
        assert int(headers["content-length"]) == len(body)
    headers, body = raw(deployment.client, f"{job_path}/images.zip", **GZIP, Range="bytes=9-99")
    assert headers["content-range"].startswith("bytes 9-99/") and len(body) == 91


def test_events_are_not(deployment: Deployment, job_path: str) -> None:
    headers, body = raw(deployment.client, f"{job_path}/events", **GZIP)
    assert "content-encoding" not in headers and b"event: job" in body


def test_tags_of_compressed_responses_are_weak_and_work(deployment: Deployment) -> None:
    for path in ("/docs/swagger-ui.css", "/web/page.css"):
        headers, _ = raw(deployment.client, path, **GZIP)
        plain, _ = raw(deployment.client, path, **PLAIN)
        assert headers["content-encoding"] == "gzip"
        assert headers["etag"] == f"W/{plain['etag']}"
        again = deployment.client.get(path, headers={**GZIP, "If-None-Match": headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


def test_large_problem_is_compressed(deployment: Deployment) -> None:
    body = {"model": "demo", "prompts": [{"prompt": "a", "x": 1}] * 40}
    with deployment.client.stream("POST", "/v1/jobs", json=body, headers=GZIP) as response:
        assert (response.status_code, response.headers["content-encoding"]) == (422, "gzip")
        assert len(json.loads(gzip.decompress(b"".join(response.iter_raw())))["errors"]) == 40


def test_base64_pictures_are_not(deployment: Deployment) -> None:
    client, body = deployment.client, {"prompt": "a", "n": 10}
    with (
        working(deployment),
        client.stream("POST", "/v1/images/generations", json=body, headers=GZIP) as response,
    ):
        sent = b"".join(response.iter_raw())
    assert "content-encoding" not in response.headers
    assert len(sent) > SMALLEST_BYTES and len(json.loads(sent)["data"]) == 10
