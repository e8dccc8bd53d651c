"""Addresses that webhooks are never sent to."""

from pathlib import Path

import pytest

from jobs.runtime.embedded_queue import EmbeddedServer
from service.webhooks.address import Refused, is_public, target_of
from tests.service.conftest import deployed, pointers

PRIVATE = [
    "http://127.0.0.1:1/",
    "http://localhost/",
    "http://x.localhost/",
    "http://10.0.0.1/",
    "http://192.168.1.1/",
    "http://169.254.169.254/latest/meta-data",
    "http://[::1]/",
    "http://[fd00::1]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[2002:7f00:1::]/",
    "http://0.0.0.0/",
    "http://224.0.0.1/",
    "http://100.64.0.1/",
]


def test_remote_service_refuses_private_addresses(server: EmbeddedServer, tmp_path: Path) -> None:
    with deployed(server.url, tmp_path, webhook_private=False) as guarded:
        for url in PRIVATE:
            body = {"model": "demo", "prompts": ["a"], "webhook": {"url": url}}
            response = guarded.client.post("/v1/jobs", json=body)
            assert (response.status_code, pointers(response)) == (422, ["/webhook/url"]), url
        guarded.submit("a", webhook={"url": "http://8.8.8.8/"})


def test_resolved_addresses_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(name: str, port: int, **_: object) -> list:
        addresses = {"open.test": ["93.184.215.14"], "mixed.test": ["93.184.215.14", "10.0.0.1"]}
        return [(2, 1, 6, "", (address, port)) for address in addresses[name]]

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    target = target_of("https://open.test/hook?x=1", private=False)
    assert (target.url, target.host) == ("https://93.184.215.14:443/hook?x=1", "open.test")
    assert target.server_name == "open.test"
    with pytest.raises(Refused, match=r"10\.0\.0\.1"):
        target_of("https://mixed.test/", private=False)
    assert target_of("https://mixed.test/", private=True).server_name == "mixed.test"


def test_is_public() -> None:
    assert is_public("8.8.8.8") and is_public("2606:4700::1111")
    assert not is_public("fe80::1%eth0")
