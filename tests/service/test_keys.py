"""API keys: authentication, limits, and isolation of tenants."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from jobs.errors import ConfigurationError
from jobs.runtime.embedded_queue import EmbeddedServer
from service import keys
from service.http.auth import check_reach
from service.keys import KeyRing
from service.settings import ServiceSettings
from tests import web
from tests.service.conftest import Deployment, deployed, pointers, working
from tests.service.live import listening
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes of the key file are noticed immediately."""
    monkeypatch.setattr(keys, "RECHECK_SECONDS", 0)


@pytest.fixture
def guarded(server: EmbeddedServer, tmp_path: Path) -> Iterator[tuple[Deployment, dict[str, str]]]:
    """A service with keys for alice and bob, and the headers that send them."""
    ring = KeyRing(tmp_path / "keys.json")
    keys = {
        "alice": ring.add("alice", max_unfinished=5, max_priority=3)[0],
        "bob": ring.add("bob", weight=2.0)[0],
    }
    headers = {name: {"Authorization": f"Bearer {key}"} for name, key in keys.items()}
    with deployed(server.url, tmp_path) as service:
        yield service, headers


def body(**fields: object) -> dict:
    return {"model": "demo", "prompts": ["a"], "priority": 1, **fields}


def test_only_health_needs_no_key(guarded: tuple) -> None:
    deployment, _ = guarded
    document = deployment.client.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for method in methods:
            response = deployment.client.request(method, path.replace("{index}", "0"))
            if path in ("/healthz", "/readyz", "/metrics", "/health", "/v1/health"):
                assert response.status_code in (200, 503), path
                continue
            assert response.status_code == 401, (method, path)
            assert response.headers["www-authenticate"] == "Bearer"
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


@pytest.mark.parametrize(
    "header", ["Bearer nope", "Bearer ", "Basic YTpi", "im_x", "Bearer \u00e4", "Bearer a b"]
)
def test_unknown_key_is_401(guarded: tuple, header: str) -> None:
    deployment, _ = guarded
    response = deployment.client.get(
        "/v1/jobs", headers={"Authorization": header.encode("latin-1")}
    )
    assert (response.status_code, response.json()["status"]) == (401, 401)


MALFORMED = ["Basic", "Basic ", "Basic !", "Basic YQ==", "Basic w7w=", "Bearer", "Bearer ", "", "x"]
"""Headers without a credential: the third isn't base64, the fourth has no colon, the fifth isn't
ASCII."""


@pytest.mark.parametrize("header", MALFORMED)
def test_malformed_header_is_no_credential(
    guarded: tuple, deployment: Deployment, header: str
) -> None:
    headers = {"Authorization": header}
    for path in ("/sdapi/v1/sd-models", "/v1/jobs", "/v1/batches"):
        assert deployment.client.get(path, headers=headers).status_code == 200, path
        refused = guarded[0].client.get(path, headers=headers)
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        document = refused.json()
        if path == "/v1/batches":
            assert document["error"]["code"] == "unauthenticated"
        else:
            assert document["type"] == "urn:imagemill:problem:unauthenticated"
            assert "API key" in document["detail"]


def test_tenants_cannot_see_each_others_jobs(guarded: tuple) -> None:
    deployment, headers = guarded
    job = deployment.client.post("/v1/jobs", json=body(), headers=headers["alice"]).json()
    deployment.worker.finish_all()
    for method, path in [
        ("GET", ""),
        ("GET", "?wait=1"),
        ("GET", "/events"),
        ("GET", "/images/0"),
        ("HEAD", "/images/0"),
        ("GET", "/images/0/preview"),
        ("GET", "/images.zip"),
        ("GET", "/sheet.png"),
        ("POST", "/cancel"),
        ("POST", "/retry"),
        ("DELETE", ""),
    ]:
        response = deployment.client.request(
            method, job["urls"]["self"] + path, headers=headers["bob"]
        )
        assert response.status_code == 404, (method, path)
    assert deployment.client.get("/v1/jobs", headers=headers["bob"]).json()["data"] == []
    own = deployment.client.get(job["urls"]["self"] + "/images/0", headers=headers["alice"])
    assert own.status_code == 200


def test_tenants_cannot_see_each_others_files_and_batches(guarded: tuple) -> None:
    deployment, headers = guarded
    line = {"custom_id": "a", "method": "POST", "url": "/v1/images/generations"}
    data = json.dumps({**line, "body": {"prompt": "a", "priority": 1}})
    upload = {"files": {"file": data.encode()}, "data": {"purpose": "batch"}}
    file = deployment.client.post("/v1/files", headers=headers["alice"], **upload).json()["id"]
    fields = {"endpoint": "/v1/images/generations", "completion_window": "24h"}
    fields["input_file_id"] = file
    stolen = deployment.client.post("/v1/batches", json=fields, headers=headers["bob"])
    assert stolen.status_code == 404
    batch = deployment.client.post("/v1/batches", json=fields, headers=headers["alice"]).json()[
        "id"
    ]
    for path in (f"files/{file}", f"files/{file}/content", f"batches/{batch}"):
        assert deployment.client.get(f"/v1/{path}", headers=headers["bob"]).status_code == 404
        assert deployment.client.get(f"/v1/{path}", headers=headers["alice"]).status_code == 200


def test_idempotency_keys_are_per_tenant(guarded: tuple) -> None:
    deployment, headers = guarded
    job_ids = {
        deployment.client.post(
            "/v1/jobs", json=body(), headers={**credentials, "Idempotency-Key": "same"}
        ).json()["id"]
        for credentials in headers.values()
    }
    assert len(job_ids) == 2


def test_key_has_its_own_quota_and_max_priority(guarded: tuple) -> None:
    deployment, headers = guarded
    refused = deployment.client.post("/v1/jobs", json=body(priority=4), headers=headers["alice"])
    assert (refused.status_code, pointers(refused)) == (422, ["/priority"])
    plain = {"model": "demo", "prompts": ["a"]}
    usual = deployment.client.post("/v1/jobs", json=plain, headers=headers["alice"])
    assert (usual.status_code, usual.json()["priority"]) == (202, 3)
    many = deployment.client.post("/v1/jobs", json=body(n=6), headers=headers["alice"])
    assert (many.status_code, many.json()["type"][-14:]) == (429, "quota-exceeded")
    both = deployment.client.post("/v1/jobs", json=body(n=6, priority=9), headers=headers["bob"])
    assert both.status_code == 202


def test_low_priority_key_can_omit_priority_on_openai_routes(guarded: tuple) -> None:
    deployment, headers = guarded
    with working(deployment):
        response = deployment.client.post(
            "/v1/images/generations", json={"prompt": "a"}, headers=headers["alice"]
        )
    assert response.status_code == 200, response.text
    job = deployment.client.get(
        f"/v1/jobs/{response.json()['job']}", headers=headers["alice"]
    ).json()
    assert job["priority"] == 3
    refused = deployment.client.post(
        "/v1/images/generations", json={"prompt": "a", "priority": 5}, headers=headers["alice"]
    )
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "priority")


def test_low_priority_key_can_create_batches(guarded: tuple) -> None:
    deployment, headers = guarded
    line = {"method": "POST", "url": "/v1/images/generations"}
    lines = [
        {**line, "custom_id": "usual", "body": {"prompt": "a"}},
        {**line, "custom_id": "high", "body": {"prompt": "a", "priority": 4}},
    ]
    data = "\n".join(map(json.dumps, lines)).encode()
    upload = {"files": {"file": data}, "data": {"purpose": "batch"}}
    file = deployment.client.post("/v1/files", headers=headers["alice"], **upload).json()["id"]
    fields = {"endpoint": "/v1/images/generations", "completion_window": "24h"}
    fields["input_file_id"] = file
    made = deployment.client.post("/v1/batches", json=fields, headers=headers["alice"]).json()

    def checked() -> dict | None:
        path = f"/v1/batches/{made['id']}"
        latest = deployment.client.get(path, headers=headers["alice"]).json()
        return None if latest["status"] == "validating" else latest

    batch = wait_until(checked)
    assert batch["request_counts"] == {"total": 2, "completed": 0, "failed": 1}
    (job_id,) = batch["jobs"]
    assert deployment.store.job(job_id, "alice").priority == 3


def test_weights_determine_shares(guarded: tuple) -> None:
    deployment, headers = guarded
    for shown in headers.values():
        deployment.client.post("/v1/jobs", json=body(prompts=["a"] * 5), headers=shown)
    first = [deployment.worker.claim(1)[0].job_id for _ in range(6)]
    shares = [sum(deployment.store.job(job, None).tenant == "bob" for job in first)]
    assert shares == [4]


def test_rate_limit_is_per_key(guarded: tuple) -> None:
    deployment, headers = guarded
    ring = KeyRing(deployment.settings.data / "keys.json")
    slow = {"Authorization": f"Bearer {ring.add('carol', rate='2/hour')[0]}"}
    statuses = [deployment.client.get("/v1/jobs", headers=slow).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    response = deployment.client.get("/v1/jobs", headers=slow)
    assert 0 < int(response.headers["retry-after"]) <= 3600
    assert response.json()["type"] == "urn:imagemill:problem:rate-limited"
    assert deployment.client.get("/v1/jobs", headers=headers["bob"]).status_code == 200


def test_keys_can_be_added_and_revoked_at_runtime(guarded: tuple) -> None:
    deployment, headers = guarded
    ring = KeyRing(deployment.settings.data / "keys.json")
    text, key = ring.add("dora")
    new = {"Authorization": f"Bearer {text}"}
    assert deployment.client.get("/v1/jobs", headers=new).status_code == 200
    ring.revoke(key.id)
    assert deployment.client.get("/v1/jobs", headers=new).status_code == 401
    (deployment.settings.data / "keys.json").write_text("{")
    assert deployment.client.get("/v1/jobs", headers=headers["bob"]).status_code == 200


def test_revoking_the_last_key_does_not_open_a_remote_service(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    ring = KeyRing(tmp_path / "keys.json")
    _, key = ring.add("alice")
    with deployed(server.url, tmp_path, host="0.0.0.0") as reached:
        ring.revoke(key.id)
        assert reached.client.get("/v1/jobs").status_code == 401


def test_remote_service_needs_keys_or_a_setting(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path / "keys.json")
    check_reach(ServiceSettings(), ring)
    check_reach(ServiceSettings(host="0.0.0.0", anonymous=True), ring)
    with pytest.raises(ConfigurationError, match=r"imagemill keys add"):
        check_reach(ServiceSettings(host="0.0.0.0"), ring)
    ring.add("alice")
    check_reach(ServiceSettings(host="0.0.0.0"), ring)


def test_other_sites_pages_cannot_use_an_open_service(deployment: Deployment) -> None:
    job = deployment.submit("a")
    for site, expected in [("cross-site", 403), ("same-origin", 200), ("none", 200)]:
        headers = {"Sec-Fetch-Site": site}
        response = deployment.client.post(job["urls"]["cancel"], headers=headers)
        assert response.status_code == expected
    assert deployment.client.get("/v1/jobs", headers={"Sec-Fetch-Site": "cross-site"}).is_success


def test_openai_client_sends_its_key(guarded: tuple) -> None:
    deployment, headers = guarded
    with listening(deployment.client.app) as address:
        key = headers["bob"]["Authorization"].removeprefix("Bearer ")
        with openai.OpenAI(base_url=f"{address}/v1", api_key=key) as client:
            assert next(iter(client.models.list())).id == "demo"
        with (
            openai.OpenAI(base_url=f"{address}/v1", api_key="no", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError, match="unknown API key"),
        ):
            client.images.generate(prompt="a")


def test_keys_are_hashed_and_private_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    text, key = KeyRing(path).add("alice", weight=2.5, rate="5/second")
    assert text not in path.read_text() and key.sha256 in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    assert KeyRing(path).find(text) == key
    assert KeyRing(path).find(key.sha256) is None


def test_remote_service_without_keys_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text('[models.demo]\npath = "./model"\n')
    env = os.environ | {
        "IMAGEMILL_DATA": str(tmp_path),
        "IMAGEMILL_MODELS": str(tmp_path / "models.toml"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "service", "--host", "0.0.0.0", "--port", "0"],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "imagemill keys add" in done.stderr


def test_running_service_accepts_a_new_key(guarded: tuple) -> None:
    deployment, headers = guarded
    with listening(deployment.client.app) as address:
        wait_until(lambda: web.get(f"{address}/v1/jobs", headers=headers["bob"]).is_success)
        key = KeyRing(deployment.settings.data / "keys.json").add("carol")[0]
        late = {"Authorization": f"Bearer {key}"}
        wait_until(lambda: web.get(f"{address}/v1/jobs", headers=late).is_success)
