"""Which pages may call a service without keys, and under which names it goes."""

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
    with deployed(server.url, folder, start=False, **settings) as found:
        yield found


def status(mill: Deployment, method: str = "GET", **headers: str) -> int:
    answer = mill.client.request(method, "/sdapi/v1/interrupt", headers=headers)
    if method == "GET":
        answer = mill.client.get("/v1/jobs", headers=headers)
    if answer.status_code == 403:
        assert answer.json()["type"] == "urn:imagemill:problem:cross-site"
    return answer.status_code


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("mill.localhost:8000", 200),
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
def test_a_service_without_keys_goes_by_its_machine_s_names(
    mill: Deployment, host: str, expected: int
) -> None:
    assert status(mill, Host=host) == expected
    assert status(mill, "POST", Host=host) == expected


def test_it_goes_by_what_the_settings_call_it(server: EmbeddedServer, tmp_path: Path) -> None:
    with called(server, tmp_path, public_url=f"{SITE}:8443/mill") as mill:
        assert status(mill, Host="site.example:8443") == 200
        assert status(mill, "POST", Host="localhost", Origin=f"{SITE}:8443") == 200
        assert status(mill, "POST", Host="localhost", Origin=SITE) == 403
        assert status(mill, Host="evil.example") == 403


@pytest.mark.parametrize("settings", [{"anonymous": True}, {"anonymous": True, "host": "0.0.0.0"}])
def test_a_service_that_is_open_on_purpose_goes_by_any_name(
    server: EmbeddedServer, tmp_path: Path, settings: dict
) -> None:
    with called(server, tmp_path, **settings) as mill:
        assert status(mill, Host="evil.example") == 200
        assert status(mill, "POST", Host="a.example", Origin="https://b.example") == 200
        assert status(mill, "POST", **{"Sec-Fetch-Site": "cross-site"}) == 403


def test_with_keys_the_key_decides(server: EmbeddedServer, tmp_path: Path) -> None:
    shown, _ = KeyRing(tmp_path / "keys.json").add("alice")
    with called(server, tmp_path) as mill:
        key = {"Authorization": f"Bearer {shown}"}
        assert status(mill, "POST", Host="evil.example", Origin=SITE, **key) == 200
        assert status(mill, "POST", Host="evil.example", Origin=SITE) == 401


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
def test_another_site_s_page_changes_nothing(mill: Deployment, origin: str, expected: int) -> None:
    assert status(mill, "POST", Host="localhost:8000", Origin=origin) == expected
    assert status(mill, "GET", Host="localhost:8000", Origin=origin) == 200


@pytest.mark.parametrize("origins", [SITE, "*", f"http://a.example, {SITE}"])
def test_the_sites_that_may_call(
    server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, origins: str
) -> None:
    monkeypatch.setenv("IMAGEMILL_CORS_ORIGINS", origins)
    listed = ServiceSettings.read().cors_origins
    with called(server, tmp_path, cors_origins=listed) as mill:
        asked = {"Access-Control-Request-Method": "POST", "Origin": SITE}
        preflight = mill.client.options("/v1/jobs", headers=asked)
        assert preflight.status_code == 200
        assert "POST" in preflight.headers["access-control-allow-methods"]
        page = {"Origin": SITE, "Sec-Fetch-Site": "cross-site"}
        body = {"model": "demo", "prompts": ["a"]}
        made = mill.client.post("/v1/jobs", json=body, headers=page)
        assert made.status_code == 202
        assert made.headers["access-control-allow-origin"] in (SITE, "*")
        assert "ETag" in made.headers["access-control-expose-headers"]


def test_no_site_may_call_unless_it_is_named(server: EmbeddedServer, tmp_path: Path) -> None:
    for settings in ({}, {"cors_origins": ("http://a.example",)}):
        with called(server, tmp_path, **settings) as mill:
            answer = mill.client.get("/v1/jobs", headers={"Origin": SITE})
            assert "access-control-allow-origin" not in answer.headers
            assert status(mill, "POST", Origin=SITE) == 403


@pytest.mark.parametrize("origins", ["a.example", "https://a.example/", "ftp://a", "https://*.a"])
def test_what_is_no_origin_ends_the_process(monkeypatch: pytest.MonkeyPatch, origins: str) -> None:
    monkeypatch.setenv("IMAGEMILL_CORS_ORIGINS", origins)
    with pytest.raises(ConfigurationError, match=r"CORS_ORIGINS"):
        ServiceSettings.read()
