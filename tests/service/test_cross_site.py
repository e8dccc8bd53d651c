"""Which origins and hosts a service without keys accepts."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobs.errors import ConfigurationError
from jobs.runtime.embedded_queue import EmbeddedServer
from service.keys import KeyRing
from service.settings import ServiceSettings
from tests.service.conftest import Deployment, deployed

SITE = "https://site.example"


@contextmanager
def called(server: EmbeddedServer, folder: Path, **settings: object) -> Iterator[Deployment]:
    with deployed(server.url, folder, start=False, **settings) as service:
        yield service


def status(deployment: Deployment, method: str = "GET", **headers: str) -> int:
    response = deployment.client.request(method, "/sdapi/v1/interrupt", headers=headers)
    if method == "GET":
        response = deployment.client.get("/v1/jobs", headers=headers)
    if response.status_code == 403:
        assert response.json()["type"] == "urn:imagemill:problem:cross-site"
    return response.status_code


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("deployment.localhost:8000", 200),
        ("localhost.", 200),
        ("127.0.0.1:8000", 200),
        ("127.8.9.1", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("192.168.1.7", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
def test_service_without_keys_accepts_local_hosts(
    deployment: Deployment, host: str, expected: int
) -> None:
    assert status(deployment, Host=host) == expected
    assert status(deployment, "POST", Host=host) == expected


def test_host_and_public_url_are_accepted(server: EmbeddedServer, tmp_path: Path) -> None:
    with called(server, tmp_path, public_url=f"{SITE}:8443/deployment") as deployment:
        assert status(deployment, Host="site.example:8443") == 200
        assert status(deployment, "POST", Host="localhost", Origin=f"{SITE}:8443") == 200
        assert status(deployment, "POST", Host="localhost", Origin=SITE) == 403
        assert status(deployment, Host="evil.example") == 403


@pytest.mark.parametrize("settings", [{"anonymous": True}, {"anonymous": True, "host": "0.0.0.0"}])
def test_anonymous_service_accepts_any_host(
    server: EmbeddedServer, tmp_path: Path, settings: dict
) -> None:
    with called(server, tmp_path, **settings) as deployment:
        assert status(deployment, Host="evil.example") == 200
        assert status(deployment, "POST", Host="a.example", Origin="https://b.example") == 200
        assert status(deployment, "POST", **{"Sec-Fetch-Site": "cross-site"}) == 403


def test_any_host_is_accepted_with_keys(server: EmbeddedServer, tmp_path: Path) -> None:
    text, _ = KeyRing(tmp_path / "keys.json").add("alice")
    with called(server, tmp_path) as deployment:
        key = {"Authorization": f"Bearer {text}"}
        assert status(deployment, "POST", Host="evil.example", Origin=SITE, **key) == 200
        assert status(deployment, "POST", Host="evil.example", Origin=SITE) == 401


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("http://localhost:8000", 200),
        ("https://localhost:8000", 200),
        ("http://localhost:9000", 403),
        ("http://evil.example", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_other_sites_cannot_post(deployment: Deployment, origin: str, expected: int) -> None:
    assert status(deployment, "POST", Host="localhost:8000", Origin=origin) == expected
    assert status(deployment, "GET", Host="localhost:8000", Origin=origin) == 200


@pytest.mark.parametrize("origins", [SITE, "*", f"http://a.example, {SITE}"])
def test_allowed_origins(
    server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, origins: str
) -> None:
    monkeypatch.setenv("IMAGEMILL_CORS_ORIGINS", origins)
    listed = ServiceSettings.read().cors_origins
    with called(server, tmp_path, cors_origins=listed) as deployment:
        asked = {"Access-Control-Request-Method": "POST", "Origin": SITE}
        preflight = deployment.client.options("/v1/jobs", headers=asked)
        assert preflight.status_code == 200
        assert "POST" in preflight.headers["access-control-allow-methods"]
        page = {"Origin": SITE, "Sec-Fetch-Site": "cross-site"}
        body = {"model": "demo", "prompts": ["a"]}
        response = deployment.client.post("/v1/jobs", json=body, headers=page)
        assert response.status_code == 202
        assert response.headers["access-control-allow-origin"] in (SITE, "*")
        assert "ETag" in response.headers["access-control-expose-headers"]


def test_no_origin_is_allowed_by_default(server: EmbeddedServer, tmp_path: Path) -> None:
    for settings in ({}, {"cors_origins": ("http://a.example",)}):
        with called(server, tmp_path, **settings) as deployment:
            response = deployment.client.get("/v1/jobs", headers={"Origin": SITE})
            assert "access-control-allow-origin" not in response.headers
            assert status(deployment, "POST", Origin=SITE) == 403


@pytest.mark.parametrize("origins", ["a.example", "https://a.example/", "ftp://a", "https://*.a"])
def test_invalid_origin_is_a_configuration_error(
    monkeypatch: pytest.MonkeyPatch, origins: str
) -> None:
    monkeypatch.setenv("IMAGEMILL_CORS_ORIGINS", origins)
    with pytest.raises(ConfigurationError, match=r"CORS_ORIGINS"):
        ServiceSettings.read()
