"""Requests outside the routes: unknown paths, wrong methods, internal errors; and OpenAPI."""

import json

import pytest
from starlette.testclient import TestClient

from jobs.reports import WorkerReport
from service.http.errors import STATUS, as_openai, as_problem, failure_of
from tests.service.conftest import Deployment


def test_unknown_path_is_a_problem(deployment: Deployment) -> None:
    for path in ("/nope", "/v1/jobs/", "/v2", "/v1/jobs/x/y/z", "/%ff", "/\u00e4"):
        response = deployment.client.get(path)
        assert response.status_code == 404
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["status"] == 404


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/jobs", "GET, POST"),
        ("POST", "/v1/jobs/x", "GET, HEAD, DELETE"),
        ("GET", "/v1/jobs/x/cancel", "POST"),
        ("POST", "/v1/jobs/x/images/0", "GET, HEAD"),
        ("DELETE", "/healthz", "GET, HEAD"),
        ("BREW", "/v1/models", "GET, HEAD"),
    ],
)
def test_wrong_method_is_a_problem(
    deployment: Deployment, method: str, path: str, allowed: str
) -> None:
    response = deployment.client.request(method, path)
    assert (response.status_code, response.headers["allow"]) == (405, allowed)
    assert response.headers["content-type"] == "application/problem+json"


def test_head_has_no_body(deployment: Deployment) -> None:
    deployment.store.register("w1", WorkerReport("demo", "ready"), 60)
    job = deployment.submit("a")["urls"]["self"]
    for path in ("/healthz", "/readyz", "/v1/models", job, "/v1/jobs/nope"):
        plain = {"Accept-Encoding": "identity"}
        get = deployment.client.get(path, headers=plain)
        head = deployment.client.head(path, headers=plain)
        assert (head.status_code, head.content) == (get.status_code, b""), path
        assert head.headers["content-length"] == str(len(get.content)), path


def test_internal_error_is_a_problem_without_details(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(deployment.store, "workers", broken)
    client = TestClient(
        deployment.client.app, base_url="http://localhost", raise_server_exceptions=False
    )
    response = client.get("/v1/workers")
    assert (response.status_code, "secret" in response.text) == (500, False)
    assert response.headers["content-type"] == "application/problem+json"


def test_every_error_class_has_a_status() -> None:
    for cls, (status, _) in STATUS.items():
        error = cls.__new__(cls)
        Exception.__init__(error, "why")
        error.__dict__.update(problems=(), known=(), size=1, seconds=1)
        response = as_problem(failure_of(error))
        assert response.status_code == status
        assert json.loads(bytes(response.body))["detail"] == "why"
        envelope = as_openai(failure_of(error))
        assert envelope.status_code == (400 if status == 422 else status)
        assert json.loads(bytes(envelope.body))["error"]["message"] == "why"


def test_document_has_every_route_and_problem(deployment: Deployment) -> None:
    document = deployment.client.get("/openapi.json").json()
    operations = {
        (method.upper(), path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    for path in ("/healthz", "/readyz", "/metrics", "/v1/models", "/v1/workers", "/v1/jobs"):
        assert ("GET", path) in operations
    submit = operations["POST", "/v1/jobs"]
    expected = "202 400 401 403 404 413 415 422 429 503"
    assert set(submit["responses"]) == set(expected.split())
    body = submit["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/SubmitJob"}
    assert "prompts" in document["components"]["schemas"]["SubmitJob"]["properties"]
    for operation in operations.values():
        form = "application/json" if operation["tags"] == ["openai"] else "application/problem+json"
        for status, response in operation["responses"].items():
            if status >= "400":
                assert list(response["content"]) == [form]
    references = set(find_references(document))
    assert references <= {
        f"#/components/schemas/{name}" for name in document["components"]["schemas"]
    }


def find_references(value: object) -> list[str]:
    """Every $ref in the document."""
    if isinstance(value, dict):
        own = [value["$ref"]] if "$ref" in value else []
        return own + [found for inner in value.values() for found in find_references(inner)]
    if isinstance(value, list):
        return [found for inner in value for found in find_references(inner)]
    return []
