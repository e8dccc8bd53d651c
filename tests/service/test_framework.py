"""What no route asked for: unknown paths, wrong methods, faults; and the OpenAPI document."""

import json

import pytest
from starlette.testclient import TestClient

from service.http.errors import STATUS, as_openai, as_problem, failure_of
from tests.service.conftest import Deployment


def test_an_unknown_path_is_a_problem(mill: Deployment) -> None:
    for path in ("/nope", "/v1/jobs/", "/v2", "/v1/jobs/x/y/z", "/%ff", "/\u00e4"):
        answer = mill.client.get(path)
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["status"] == 404


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
def test_a_wrong_method_is_a_problem(
    mill: Deployment, method: str, path: str, allowed: str
) -> None:
    answer = mill.client.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    assert answer.headers["content-type"] == "application/problem+json"


def test_head_is_get_without_a_body(mill: Deployment) -> None:
    mill.store.register("w1", {"model": "demo", "state": "ready"}, 60)
    job = mill.submit("a")["urls"]["self"]
    for path in ("/healthz", "/readyz", "/v1/models", job, "/v1/jobs/nope"):
        got, asked = mill.client.get(path), mill.client.head(path)
        assert (asked.status_code, asked.content) == (got.status_code, b""), path
        assert asked.headers["content-length"] == str(len(got.content)), path


def test_a_fault_is_a_problem_and_tells_no_secrets(
    mill: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(mill.store, "workers", broken)
    client = TestClient(mill.client.app, base_url="http://localhost", raise_server_exceptions=False)
    answer = client.get("/v1/workers")
    assert (answer.status_code, "secret" in answer.text) == (500, False)
    assert answer.headers["content-type"] == "application/problem+json"


def test_every_error_of_ours_has_a_status() -> None:
    for error, (status, _) in STATUS.items():
        made = error.__new__(error)
        Exception.__init__(made, "why")
        made.__dict__.update(problems=(), known=(), size=1, seconds=1)
        answer = as_problem(failure_of(made))
        assert answer.status_code == status
        assert json.loads(bytes(answer.body))["detail"] == "why"
        envelope = as_openai(failure_of(made))
        assert envelope.status_code == (400 if status == 422 else status)
        assert json.loads(bytes(envelope.body))["error"]["message"] == "why"


def test_the_document_knows_every_route_and_problem(mill: Deployment) -> None:
    document = mill.client.get("/openapi.json").json()
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
        for status, answer in operation["responses"].items():
            if status >= "400":
                assert list(answer["content"]) == [form]
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
