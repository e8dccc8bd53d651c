"""Signed URLs: results can be read without a key, and nothing else can."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from pydantic import ValidationError

from jobs.runtime.embedded_queue import EmbeddedServer
from service.keys import KeyRing
from service.settings import ServiceSettings
from tests.service.conftest import Deployment, deployed, working
from tests.waiting import PATIENCE


@pytest.fixture(scope="module")
def keyed(
    server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Deployment, dict[str, str]]]:
    """A service with a key, and the header that carries it."""
    folder = tmp_path_factory.mktemp("keyed")
    text, _ = KeyRing(folder / "keys.json").add("alice")
    with deployed(server.url, folder, url_seconds=3600) as service:
        yield service, {"Authorization": f"Bearer {text}"}


@pytest.fixture
def job(keyed: tuple[Deployment, dict[str, str]]) -> dict:
    """A finished job of the key's tenant."""
    service, key = keyed
    body = {"model": "demo", "prompts": ["a", "b"]}
    path = service.client.post("/v1/jobs", json=body, headers=key).json()["urls"]["self"]
    service.worker.finish_all()
    return service.client.get(path, headers=key).json()


def test_urls_of_results_work_without_a_key(
    keyed: tuple[Deployment, dict[str, str]], job: dict
) -> None:
    service, key = keyed
    for image in job["images"]:
        response = service.client.get(image["url"])
        assert (response.status_code, len(response.content)) == (200, image["size"])
        assert service.client.head(image["url"]).status_code == 200
        part = service.client.get(image["url"], headers={"Range": "bytes=0-3"})
        assert (part.status_code, part.content) == (206, response.content[:4])
    assert service.client.get(job["urls"]["zip"]).headers["content-type"] == "application/zip"
    sheet = service.client.get(job["urls"]["sheet"] + "&columns=1")
    assert sheet.headers["content-type"] == "image/png"
    bare = urlsplit(job["images"][0]["url"]).path
    assert service.client.get(bare).status_code == 401
    assert service.client.get(bare, headers=key).status_code == 200


def test_other_urls_are_not_signed(keyed: tuple[Deployment, dict[str, str]], job: dict) -> None:
    service, _ = keyed
    for name in ("self", "events", "cancel", "retry"):
        assert "?" not in job["urls"][name]
    query = urlsplit(job["images"][0]["url"]).query
    for method, path in (
        ("GET", job["urls"]["self"]),
        ("DELETE", job["urls"]["self"]),
        ("GET", "/v1/jobs"),
    ):
        assert service.client.request(method, f"{path}?{query}").status_code == 401


def test_changed_urls_are_refused(keyed: tuple[Deployment, dict[str, str]], job: dict) -> None:
    service, _ = keyed
    first, second = (urlsplit(image["url"]) for image in job["images"])
    query = {name: values[0] for name, values in parse_qs(first.query).items()}
    expires, signature = query["expires"], query["signature"]
    flipped = ("B" if signature[0] == "A" else "A") + signature[1:]
    for path, changed in (
        (second.path, first.query),
        (f"{first.path}/thumbnail", first.query),
        (f"{first.path}/recipe", first.query),
        (first.path, f"expires={int(expires) + 1}&signature={signature}"),
        (first.path, f"expires={expires}&signature={flipped}"),
        (first.path, f"expires={expires}&signature={signature[:-1]}"),
        (first.path, f"expires={expires}&signature="),
        (first.path, f"expires={expires}&signature=%C3%A4"),
        (first.path, f"signature={signature}"),
    ):
        response = service.client.get(f"{path}?{changed}")
        assert response.status_code == 403, (path, changed)
        assert response.json()["type"] == "urn:imagemill:problem:invalid-signature"
    assert service.client.get(f"{first.path}?expires={expires}").status_code == 401


def test_expired_url_is_refused(
    keyed: tuple[Deployment, dict[str, str]], job: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, key = keyed
    url = job["images"][0]["url"]
    expires = int(parse_qs(urlsplit(url).query)["expires"][0])
    assert 3600 < expires - job["finished"] < 3600 + 3600 / 24 + PATIENCE
    monkeypatch.setattr("service.http.signed_urls.time.time", lambda: expires - 1)
    assert service.client.get(url).status_code == 200
    monkeypatch.setattr("service.http.signed_urls.time.time", lambda: expires + 1)
    response = service.client.get(url)
    assert (response.status_code, "expired" in response.json()["detail"]) == (403, True)
    assert service.client.get(url, headers=key).status_code == 200


def test_urls_on_openai_routes_are_signed(keyed: tuple[Deployment, dict[str, str]]) -> None:
    service, key = keyed
    body = {"prompt": "a", "response_format": "url"}
    with working(service):
        response = service.client.post("/v1/images/generations", json=body, headers=key)
    url = response.json()["data"][0]["url"]
    assert url.startswith("http://localhost/v1/jobs/")
    assert service.client.get(url).status_code == 200


def test_open_service_signs_nothing(deployment: Deployment) -> None:
    job = deployment.submit("a")
    deployment.worker.finish_all()
    image = deployment.job(job["id"])["images"][0]
    assert "?" not in image["url"] and "?" not in job["urls"]["zip"]
    assert deployment.client.get(f"{image['url']}?expires=1&signature=x").status_code == 200


def test_secret_outlives_a_restart(server: EmbeddedServer, tmp_path: Path) -> None:
    text, _ = KeyRing(tmp_path / "keys.json").add("alice")
    key = {"Authorization": f"Bearer {text}"}
    urls = []
    for settings in ({}, {}, {"url_secret": "s" * 32}, {"url_seconds": 0}):
        with deployed(server.url, tmp_path, pool="restarted", **settings) as service:
            if not urls:
                body = {"model": "demo", "prompts": ["a"]}
                path = service.client.post("/v1/jobs", json=body, headers=key).json()["urls"]
                service.worker.finish_all()
            urls.append(service.client.get(path["self"], headers=key).json()["images"][0]["url"])
            status = service.client.get(urls[0]).status_code
            assert status == (403 if "url_secret" in settings else 200)
    assert "?" not in urls[-1]
    assert (tmp_path / "urls" / "secret").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ValidationError):
        ServiceSettings(url_secret="short")
