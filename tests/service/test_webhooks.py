"""Webhooks against a receiver that listens: signed, repeated until heard, never led astray."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import redis
from pydantic import ValidationError
from standardwebhooks import Webhook
from structlog.testing import capture_logs

from jobs.queue.keys import Keys
from jobs.runtime.embedded_queue import EmbeddedServer
from service import keys as service_keys
from service.keys import KeyRing
from service.settings import ServiceSettings
from service.webhooks import sender
from service.webhooks.address import Refused, is_public, target_of
from service.webhooks.outbox import Outbox, kept_secret
from tests.service.conftest import Deployment, deployed, pointers
from tests.waiting import PATIENCE, wait_until

SECRET = "whsec_c2VjcmV0IHNlY3JldCBzZWNyZXQ="


@dataclass
class Receiver:
    """What a receiver got, and what it answers: the statuses in turn, then 204."""

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    got: list[tuple[dict[str, str], str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    block: threading.Event | None = None

    def messages(self) -> list[dict]:
        """The verified messages."""
        return [Webhook(SECRET).verify(body, headers) for headers, body in self.got]


@contextmanager
def receiving() -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            if receiver.block:
                receiver.block.wait(PATIENCE)
            receiver.paths.append(self.path)
            status = receiver.statuses.pop(0) if receiver.statuses else 204
            self.send_response(status)
            if status == 302:
                self.send_header("location", receiver.url + "/elsewhere")
            self.end_headers()
            receiver.got.append((dict(self.headers), body))

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield receiver
    finally:
        if receiver.block:
            receiver.block.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


@pytest.fixture
def hooked(server: EmbeddedServer, tmp_path: Path) -> Iterator[Deployment]:
    with deployed(server.url, tmp_path, webhook_secret=SECRET) as found:
        wait_until(lambda: Outbox(tmp_path / "webhooks").cursor())
        yield found


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries come at once, and only after an answer."""
    monkeypatch.setattr(sender, "RETRY_SECONDS", (0, 0.02, 0.02, 0.02))
    monkeypatch.setattr(sender, "_TIMEOUT", PATIENCE)


def pending(deployment: Deployment) -> list:
    return Outbox(deployment.settings.data / "webhooks").pending()


def test_the_end_of_a_job_is_told_and_signed(hooked: Deployment, receiver: Receiver) -> None:
    job = hooked.submit("a", metadata={"k": 1}, webhook={"url": f"{receiver.url}/hook?x=1"})
    hooked.worker.finish_all()
    wait_until(lambda: receiver.got)
    (message,) = receiver.messages()
    assert message["type"] == "job.succeeded"
    assert message["data"]["id"] == job["id"]
    assert (message["data"]["metadata"], message["data"]["counts"]["succeeded"]) == ({"k": 1}, 1)
    assert receiver.paths == ["/hook?x=1"]
    headers = receiver.got[0][0]
    assert headers["host"] == receiver.url.removeprefix("http://")
    wait_until(lambda: not pending(hooked))


def test_only_what_was_asked_for_is_told(hooked: Deployment, receiver: Receiver) -> None:
    hook = {"url": receiver.url, "events": ["image.succeeded", "image.failed", "job.failed"]}
    job = hooked.submit("a", "b", webhook=hook)
    first, second = hooked.worker.claim(2)
    hooked.worker.finish(first)
    hooked.worker.fail(second, "no")
    wait_until(lambda: len(receiver.got) == 3)
    told = {message["type"]: message["data"] for message in receiver.messages()}
    assert set(told) == {"image.succeeded", "image.failed", "job.failed"}
    assert told["image.succeeded"]["url"] == f"/v1/jobs/{job['id']}/images/0"
    assert (told["image.failed"]["error"], told["image.failed"]["job"]) == ("no", job["id"])


def test_a_cancelled_job_is_told(hooked: Deployment, receiver: Receiver) -> None:
    job = hooked.submit("a", webhook={"url": receiver.url})
    hooked.client.post(job["urls"]["cancel"])
    wait_until(lambda: receiver.got)
    assert receiver.messages()[0]["type"] == "job.cancelled"


def test_it_is_repeated_under_the_same_id_until_heard(
    hooked: Deployment, receiver: Receiver
) -> None:
    receiver.statuses = [500, 302, 204]
    hooked.submit("a", webhook={"url": receiver.url})
    hooked.worker.finish_all()
    wait_until(lambda: len(receiver.got) == 3)
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
    assert "/elsewhere" not in receiver.paths
    wait_until(lambda: not pending(hooked))


@pytest.mark.parametrize(("statuses", "attempts"), [([500] * 9, 4), ([410] * 9, 1)])
def test_it_is_given_up_in_the_end(
    hooked: Deployment, receiver: Receiver, statuses: list[int], attempts: int
) -> None:
    receiver.statuses = statuses
    hooked.submit("a", webhook={"url": receiver.url})
    hooked.worker.finish_all()
    wait_until(lambda: receiver.got and not pending(hooked))
    assert len(receiver.got) == attempts


def test_a_slow_receiver_holds_up_no_other(hooked: Deployment, receiver: Receiver) -> None:
    receiver.block = threading.Event()
    for _ in range(12):
        hooked.submit("a", webhook={"url": receiver.url})
    hooked.worker.finish_all()
    with receiving() as other:
        hooked.submit("b", webhook={"url": other.url})
        hooked.worker.finish_all()
        wait_until(lambda: other.got)
        assert not receiver.got
    receiver.block.set()
    wait_until(lambda: len(receiver.got) == 12)


def test_a_message_knows_its_tenant(hooked: Deployment, receiver: Receiver) -> None:
    receiver.statuses = [500] * 9
    receiver.block = threading.Event()
    hooked.submit("a", webhook={"url": receiver.url})
    hooked.worker.finish_all()
    wait_until(lambda: pending(hooked))
    assert [one.tenant for one in pending(hooked)] == ["local"]
    receiver.block.set()
    wait_until(lambda: not pending(hooked))


def test_what_was_read_is_kept_now_and_then(
    hooked: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Outbox(hooked.settings.data / "webhooks")
    before = box.cursor()
    monkeypatch.setattr(sender, "CURSOR_SECONDS", -1.0)
    hooked.submit("a")  # which asks for no webhook
    wait_until(lambda: box.cursor() != before)


@pytest.mark.parametrize("keep", [1, 100])
def test_events_that_are_gone_are_missed_aloud(
    server: EmbeddedServer, tmp_path: Path, keep: int
) -> None:
    box = Outbox(tmp_path / "webhooks")
    with deployed(server.url, tmp_path, webhook_secret=SECRET) as first:
        wait_until(box.cursor)
        first.submit("a")
    box.move_cursor(first.store.events("0-0", 0)[0].id)
    first.worker.finish_all()
    with redis.Redis.from_url(server.url, protocol=2) as raw:
        raw.xtrim(Keys(first.pool)("events"), maxlen=keep, approximate=False)
    with capture_logs() as lines:
        last = first.store.last_event()
        with deployed(server.url, tmp_path, webhook_secret=SECRET, pool=first.pool):
            wait_until(lambda: box.cursor() == last)
    told = [line for line in lines if line["event"].startswith("events are gone")]
    assert [line["read_until"] < line["oldest"] for line in told] == ([True] if keep == 1 else [])


def test_what_was_not_delivered_outlives_the_process(
    server: EmbeddedServer, tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "RETRY_SECONDS", (0, 1000))
    receiver.statuses = [500]
    with deployed(server.url, tmp_path, webhook_secret=SECRET) as first:
        wait_until(lambda: Outbox(tmp_path / "webhooks").cursor())
        first.submit("a", webhook={"url": receiver.url})
        first.worker.finish_all()
        wait_until(lambda: [one for one in pending(first) if one.attempt == 1])
        store, waiting = first.store, first.submit("b", webhook={"url": receiver.url})
    box = Outbox(tmp_path / "webhooks")
    (message,) = box.pending()
    box.put(type(message)(**{**_fields(message), "due": 0.0}))
    for lease in store.claim("demo", "hand", limit=1, lease_seconds=60, nonce="again"):
        first.worker.finish(lease)
    with deployed(server.url, tmp_path, webhook_secret=SECRET, pool=first.pool):
        wait_until(lambda: len(receiver.got) == 3)
    assert waiting["id"] in {message["data"]["id"] for message in receiver.messages()}


def _fields(message: object) -> dict:
    return {name: getattr(message, name) for name in message.__slots__}


def test_only_one_process_delivers(tmp_path: Path) -> None:
    first, second = Outbox(tmp_path), Outbox(tmp_path)
    assert first.take() and first.take()
    assert not second.take()
    first.leave()
    assert second.take()
    second.leave()


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


def test_private_addresses_are_refused_where_others_can_reach_us(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    with deployed(server.url, tmp_path, webhook_private=False) as guarded:
        for url in PRIVATE:
            body = {"model": "demo", "prompts": ["a"], "webhook": {"url": url}}
            answer = guarded.client.post("/v1/jobs", json=body)
            assert (answer.status_code, pointers(answer)) == (422, ["/webhook/url"]), url
        guarded.submit("a", webhook={"url": "http://8.8.8.8/"})


def test_names_are_checked_when_they_are_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_public_means_public() -> None:
    assert is_public("8.8.8.8") and is_public("2606:4700::1111")
    assert not is_public("fe80::1%eth0")


def test_the_secret_is_made_once_and_kept_private(tmp_path: Path) -> None:
    made = kept_secret(tmp_path / "webhooks")
    assert kept_secret(tmp_path / "webhooks") == made
    assert Webhook(made).sign("msg_1", sender.datetime.now(sender.UTC), json.dumps({}))
    assert (tmp_path / "webhooks" / "secret").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_!"])
def test_a_secret_that_cannot_sign_is_refused(secret: str) -> None:
    with pytest.raises(ValidationError):
        ServiceSettings(webhook_secret=secret)


@pytest.mark.parametrize(
    ("host", "keys", "private", "allowed"),
    [
        ("127.0.0.1", 0, None, True),
        ("::1", 0, None, True),
        ("localhost", 0, None, True),
        ("0.0.0.0", 0, None, False),
        ("h", 0, None, False),
        ("127.0.0.1", 1, None, False),
        ("127.0.0.1", 1, True, True),
        ("0.0.0.0", 1, True, True),
        ("127.0.0.1", 0, False, False),
    ],
)
def test_private_webhooks_are_for_this_machine_without_keys(
    server: EmbeddedServer,
    tmp_path: Path,
    host: str,
    keys: int,
    private: bool | None,
    allowed: bool,
) -> None:
    if keys:
        KeyRing(tmp_path / "keys.json").add("alice")
    with deployed(server.url, tmp_path, host=host, webhook_private=private, start=False) as found:
        assert found.client.app.state.context.allows_private_webhooks is allowed


def test_a_message_that_may_not_be_sent_is_given_up_at_once(
    hooked: Deployment, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_keys, "RECHECK_SECONDS", 0)
    hooked.submit("a", webhook={"url": receiver.url})
    KeyRing(hooked.settings.data / "keys.json").add("alice")
    with capture_logs() as lines:
        hooked.worker.finish_all()
        wait_until(lambda: 'posts_total{outcome="given_up"}' in hooked.client.get("/metrics").text)
    wait_until(lambda: not pending(hooked))
    assert receiver.got == []
    told = [line for line in lines if line["event"].startswith("webhook")]
    assert [line["event"] for line in told] == ["webhook given up"]
    assert "not a public address" in told[0]["reason"]


def test_every_attempt_is_counted(hooked: Deployment, receiver: Receiver) -> None:
    receiver.statuses = [500, 503, 204, 410]
    for _ in range(2):
        hooked.submit("a", webhook={"url": receiver.url})
        hooked.worker.finish_all()
        wait_until(lambda: receiver.got and not pending(hooked))
    expected = {"again": 2, "heard": 1, "given_up": 1}

    def counted() -> bool:
        text = hooked.client.get("/metrics").text
        lines = [
            f'imagemill_webhook_posts_total{{outcome="{outcome}"}} {count}.0'
            for outcome, count in expected.items()
        ]
        return "imagemill_webhooks_waiting 0.0" in text and all(one in text for one in lines)

    wait_until(counted)
