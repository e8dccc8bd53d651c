"""API keys: who is let in, what each may do, and that nobody sees another's."""

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
    """Changes of the key file are noticed at once."""
    monkeypatch.setattr(keys, "RECHECK_SECONDS", 0)


@pytest.fixture
def guarded(server: EmbeddedServer, tmp_path: Path) -> Iterator[tuple[Deployment, dict[str, str]]]:
    """A service with a key each for alice and bob, and the headers that show them."""
    ring = KeyRing(tmp_path / "keys.json")
    shown = {
        "alice": ring.add("alice", max_unfinished=5, max_priority=3)[0],
        "bob": ring.add("bob", weight=2.0)[0],
    }
    headers = {name: {"Authorization": f"Bearer {key}"} for name, key in shown.items()}
    with deployed(server.url, tmp_path) as found:
        yield found, headers


def body(**fields: object) -> dict:
    return {"model": "demo", "prompts": ["a"], "priority": 1, **fields}


def test_without_a_key_nothing_but_health_is_open(guarded: tuple) -> None:
    mill, _ = guarded
    document = mill.client.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for method in methods:
            answer = mill.client.request(method, path.replace("{index}", "0"))
            if path in ("/healthz", "/readyz", "/metrics"):
                assert answer.status_code in (200, 503), path
                continue
            assert answer.status_code == 401, (method, path)
            assert answer.headers["www-authenticate"] == "Bearer"
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


@pytest.mark.parametrize(
    "header", ["Bearer nope", "Bearer ", "Basic YTpi", "im_x", "Bearer \u00e4", "Bearer a b"]
)
def test_another_key_is_401(guarded: tuple, header: str) -> None:
    mill, _ = guarded
    answer = mill.client.get("/v1/jobs", headers={"Authorization": header.encode("latin-1")})
    assert (answer.status_code, answer.json()["status"]) == (401, 401)


def test_nobody_sees_another_s_jobs(guarded: tuple) -> None:
    mill, headers = guarded
    job = mill.client.post("/v1/jobs", json=body(), headers=headers["alice"]).json()
    mill.worker.finish_all()
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
        answer = mill.client.request(method, job["urls"]["self"] + path, headers=headers["bob"])
        assert answer.status_code == 404, (method, path)
    assert mill.client.get("/v1/jobs", headers=headers["bob"]).json()["data"] == []
    own = mill.client.get(job["urls"]["self"] + "/images/0", headers=headers["alice"])
    assert own.status_code == 200


def test_nobody_sees_another_s_files_and_batches(guarded: tuple) -> None:
    mill, headers = guarded
    line = {"custom_id": "a", "method": "POST", "url": "/v1/images/generations"}
    data = json.dumps({**line, "body": {"prompt": "a", "priority": 1}})
    upload = {"files": {"file": data.encode()}, "data": {"purpose": "batch"}}
    file = mill.client.post("/v1/files", headers=headers["alice"], **upload).json()["id"]
    given = {"endpoint": "/v1/images/generations", "completion_window": "24h"}
    given["input_file_id"] = file
    stolen = mill.client.post("/v1/batches", json=given, headers=headers["bob"])
    assert stolen.status_code == 404
    batch = mill.client.post("/v1/batches", json=given, headers=headers["alice"]).json()["id"]
    for path in (f"files/{file}", f"files/{file}/content", f"batches/{batch}"):
        assert mill.client.get(f"/v1/{path}", headers=headers["bob"]).status_code == 404
        assert mill.client.get(f"/v1/{path}", headers=headers["alice"]).status_code == 200


def test_the_same_idempotency_key_of_two_tenants_is_two_jobs(guarded: tuple) -> None:
    mill, headers = guarded
    made = {
        mill.client.post(
            "/v1/jobs", json=body(), headers={**shown, "Idempotency-Key": "same"}
        ).json()["id"]
        for shown in headers.values()
    }
    assert len(made) == 2


def test_a_key_has_its_own_quota_and_highest_priority(guarded: tuple) -> None:
    mill, headers = guarded
    refused = mill.client.post("/v1/jobs", json=body(priority=4), headers=headers["alice"])
    assert (refused.status_code, pointers(refused)) == (422, ["/priority"])
    plain = {"model": "demo", "prompts": ["a"]}
    usual = mill.client.post("/v1/jobs", json=plain, headers=headers["alice"])
    assert (usual.status_code, usual.json()["priority"]) == (202, 3)
    many = mill.client.post("/v1/jobs", json=body(n=6), headers=headers["alice"])
    assert (many.status_code, many.json()["type"][-14:]) == (429, "quota-exceeded")
    both = mill.client.post("/v1/jobs", json=body(n=6, priority=9), headers=headers["bob"])
    assert both.status_code == 202


def test_a_key_of_low_priority_needs_to_name_none_on_openai_s_routes(guarded: tuple) -> None:
    mill, headers = guarded
    with working(mill):
        made = mill.client.post(
            "/v1/images/generations", json={"prompt": "a"}, headers=headers["alice"]
        )
    assert made.status_code == 200, made.text
    job = mill.client.get(f"/v1/jobs/{made.json()['job']}", headers=headers["alice"]).json()
    assert job["priority"] == 3
    refused = mill.client.post(
        "/v1/images/generations", json={"prompt": "a", "priority": 5}, headers=headers["alice"]
    )
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "priority")


def test_a_key_of_low_priority_may_begin_batches(guarded: tuple) -> None:
    mill, headers = guarded
    line = {"method": "POST", "url": "/v1/images/generations"}
    lines = [
        {**line, "custom_id": "usual", "body": {"prompt": "a"}},
        {**line, "custom_id": "high", "body": {"prompt": "a", "priority": 4}},
    ]
    data = "\n".join(map(json.dumps, lines)).encode()
    upload = {"files": {"file": data}, "data": {"purpose": "batch"}}
    file = mill.client.post("/v1/files", headers=headers["alice"], **upload).json()["id"]
    given = {"endpoint": "/v1/images/generations", "completion_window": "24h"}
    given["input_file_id"] = file
    batch = mill.client.post("/v1/batches", json=given, headers=headers["alice"]).json()
    assert batch["request_counts"] == {"total": 2, "completed": 0, "failed": 1}
    (job_id,) = batch["jobs"]
    assert mill.store.job(job_id, "alice").priority == 3


def test_weights_share_the_workers(guarded: tuple) -> None:
    mill, headers = guarded
    for shown in headers.values():
        mill.client.post("/v1/jobs", json=body(prompts=["a"] * 5), headers=shown)
    first = [mill.worker.claim(1)[0].job_id for _ in range(6)]
    shares = [sum(mill.store.job(job, None).tenant == "bob" for job in first)]
    assert shares == [4]


def test_a_rate_is_kept_by_its_key_alone(guarded: tuple) -> None:
    mill, headers = guarded
    ring = KeyRing(mill.settings.data / "keys.json")
    slow = {"Authorization": f"Bearer {ring.add('carol', rate='2/hour')[0]}"}
    statuses = [mill.client.get("/v1/jobs", headers=slow).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    answer = mill.client.get("/v1/jobs", headers=slow)
    assert 0 < int(answer.headers["retry-after"]) <= 3600
    assert answer.json()["type"] == "urn:imagemill:problem:rate-limited"
    assert mill.client.get("/v1/jobs", headers=headers["bob"]).status_code == 200


def test_a_key_can_be_made_and_taken_back_while_it_runs(guarded: tuple) -> None:
    mill, headers = guarded
    ring = KeyRing(mill.settings.data / "keys.json")
    shown, made = ring.add("dora")
    new = {"Authorization": f"Bearer {shown}"}
    assert mill.client.get("/v1/jobs", headers=new).status_code == 200
    ring.revoke(made.id)
    assert mill.client.get("/v1/jobs", headers=new).status_code == 401
    (mill.settings.data / "keys.json").write_text("{")
    assert mill.client.get("/v1/jobs", headers=headers["bob"]).status_code == 200


def test_a_service_for_others_never_opens_when_its_last_key_goes(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    ring = KeyRing(tmp_path / "keys.json")
    _, made = ring.add("alice")
    with deployed(server.url, tmp_path, host="0.0.0.0") as reached:
        ring.revoke(made.id)
        assert reached.client.get("/v1/jobs").status_code == 401


def test_reach_needs_keys_or_a_word(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path / "keys.json")
    check_reach(ServiceSettings(), ring)
    check_reach(ServiceSettings(host="0.0.0.0", anonymous=True), ring)
    with pytest.raises(ConfigurationError, match=r"imagemill keys add"):
        check_reach(ServiceSettings(host="0.0.0.0"), ring)
    ring.add("alice")
    check_reach(ServiceSettings(host="0.0.0.0"), ring)


def test_a_page_of_another_site_cannot_drive_an_open_service(mill: Deployment) -> None:
    job = mill.submit("a")
    for site, expected in [("cross-site", 403), ("same-origin", 200), ("none", 200)]:
        headers = {"Sec-Fetch-Site": site}
        answer = mill.client.post(job["urls"]["cancel"], headers=headers)
        assert answer.status_code == expected
    assert mill.client.get("/v1/jobs", headers={"Sec-Fetch-Site": "cross-site"}).is_success


def test_openai_s_client_shows_its_key(guarded: tuple) -> None:
    mill, headers = guarded
    with listening(mill.client.app) as address:
        key = headers["bob"]["Authorization"].removeprefix("Bearer ")
        with openai.OpenAI(base_url=f"{address}/v1", api_key=key) as client:
            assert next(iter(client.models.list())).id == "demo"
        with (
            openai.OpenAI(base_url=f"{address}/v1", api_key="no", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError, match="not known"),
        ):
            client.images.generate(prompt="a")


def test_keys_are_hashed_at_rest_and_for_their_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    shown, made = KeyRing(path).add("alice", weight=2.5, rate="5/second")
    assert shown not in path.read_text() and made.sha256 in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    assert KeyRing(path).find(shown) == made
    assert KeyRing(path).find(made.sha256) is None


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The command, on the keys of a folder."""
    return subprocess.run(
        [sys.executable, "-m", "service.keys", *arguments],
        env=os.environ | {"IMAGEMILL_DATA": str(folder)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_the_command(tmp_path: Path) -> None:
    made = run(tmp_path, "add", "alice", "--weight", "2", "--rate", "600/minute")
    assert made.stdout.startswith("im_") and "alice" in made.stderr
    (listed,) = json.loads(run(tmp_path, "list").stdout)
    assert (listed["tenant"], listed["weight"], "sha256" in listed) == ("alice", 2, False)
    assert run(tmp_path, "revoke", listed["id"]).returncode == 0
    assert run(tmp_path, "list").stdout == "[]\n"
    for wrong in (["revoke", "key_x"], ["add", "a/b"], ["add", "a", "--rate", "often"]):
        done = run(tmp_path, *wrong)
        assert done.returncode == 2 and "Traceback" not in done.stderr


def test_the_service_does_not_start_open_to_others(tmp_path: Path) -> None:
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


def test_a_live_service_takes_a_key_without_a_restart(guarded: tuple) -> None:
    mill, headers = guarded
    with listening(mill.client.app) as address:
        wait_until(lambda: web.get(f"{address}/v1/jobs", headers=headers["bob"]).is_success)
        made = KeyRing(mill.settings.data / "keys.json").add("carol")[0]
        late = {"Authorization": f"Bearer {made}"}
        wait_until(lambda: web.get(f"{address}/v1/jobs", headers=late).is_success)
