"""Webhooks against a real receiver: signed, retried, never sent to private addresses."""

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
from service.kept_secret import kept_secret
from service.keys import KeyRing
from service.settings import ServiceSettings
from service.webhooks import sender
from service.webhooks.outbox import Outbox
from tests.service.conftest import Deployment, deployed
from tests.waiting import PATIENCE, wait_until

SECRET = "whsec_c2VjcmV0IHNlY3JldCBzZWNyZXQ="


@dataclass
class Receiver:
    """The requests that a receiver got, and its responses: the statuses in turn, then 204."""

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    got: list[tuple[dict[str, str], str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    block: threading.Event | None = None

    def messages(self) -> list[dict]:
        """The messages, after verifying their signatures."""
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
            receiver.got.append((dict(self.headers), body))
            status = receiver.statuses.pop(0) if receiver.statuses else 204
            self.send_response(status)
            if status == 302:
                self.send_header("location", receiver.url + "/elsewhere")
            self.end_headers()

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
    with receiving() as server:
        yield server


@pytest.fixture
def hooked(server: EmbeddedServer, tmp_path: Path) -> Iterator[Deployment]:
    with deployed(server.url, tmp_path, webhook_secret=SECRET) as service:
        wait_until(lambda: Outbox(tmp_path / "webhooks").cursor())
        yield service


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries follow immediately, but only after a response."""
    monkeypatch.setattr(sender, "RETRY_SECONDS", (0, 0.02, 0.02, 0.02))
    monkeypatch.setattr(sender, "_TIMEOUT", PATIENCE)


def pending(deployment: Deployment) -> list:
    return Outbox(deployment.settings.data / "webhooks").pending()


def test_end_of_a_job_is_sent_and_signed(hooked: Deployment, receiver: Receiver) -> None:
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


def test_only_selected_events_are_sent(hooked: Deployment, receiver: Receiver) -> None:
    hook = {"url": receiver.url, "events": ["image.succeeded", "image.failed", "job.failed"]}
    job = hooked.submit("a", "b", webhook=hook)
    first, second = hooked.worker.claim(2)
    hooked.worker.finish(first)
    hooked.worker.fail(second, "no")
    wait_until(lambda: len(receiver.got) == 3)
    sent = {message["type"]: message["data"] for message in receiver.messages()}
    assert set(sent) == {"image.succeeded", "image.failed", "job.failed"}
    assert sent["image.succeeded"]["url"] == f"/v1/jobs/{job['id']}/images/0"
    assert (sent["image.failed"]["error"], sent["image.failed"]["job"]) == ("no", job["id"])


def test_cancelled_job_is_sent(hooked: Deployment, receiver: Receiver) -> None:
    job = hooked.submit("a", webhook={"url": receiver.url})
    hooked.client.post(job["urls"]["cancel"])
    wait_until(lambda: receiver.got)
    assert receiver.messages()[0]["type"] == "job.cancelled"


def test_failed_delivery_is_retried_with_the_same_id(
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
def test_delivery_is_eventually_given_up(
    hooked: Deployment, receiver: Receiver, statuses: list[int], attempts: int
) -> None:
    receiver.statuses = statuses
    hooked.submit("a", webhook={"url": receiver.url})
    hooked.worker.finish_all()
    wait_until(lambda: receiver.got and not pending(hooked))
    assert len(receiver.got) == attempts


def webhook_of(deployment: Deployment, job: dict) -> dict:
    """The job's webhook as the job shows it."""
    return deployment.job(job["id"])["webhook"]


def test_failed_attempts_are_shown_in_the_job_until_delivery(
    hooked: Deployment, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "RETRY_SECONDS", (0.02,) * 10_000)
    receiver.statuses = [503] * 10_000
    job = hooked.submit("a", webhook={"url": receiver.url})
    assert job["webhook"] == {
        "url": receiver.url,
        "events": ["job.succeeded", "job.failed", "job.cancelled"],
        "undelivered": [],
    }
    receiver.block = threading.Event()
    hooked.worker.finish_all()
    before = hooked.client.get(job["urls"]["self"]).headers["etag"]
    receiver.block.set()
    wait_until(lambda: webhook_of(hooked, job)["undelivered"])
    (shown,) = webhook_of(hooked, job)["undelivered"]
    assert (shown["event"], shown["attempts"] > 0) == ("job.succeeded", True)
    assert shown["reason"] == "the receiver answered 503"
    assert shown["last_attempt"] and shown["next_attempt"]
    assert shown["id"] == receiver.got[0][0]["webhook-id"]
    assert hooked.client.get(job["urls"]["self"]).headers["etag"] != before
    receiver.statuses.clear()
    wait_until(lambda: not webhook_of(hooked, job)["undelivered"])


def test_given_up_messages_stay_in_the_job(hooked: Deployment, receiver: Receiver) -> None:
    receiver.statuses = [500, 500, 500, 500]
    job = hooked.submit("a", webhook={"url": receiver.url})
    hooked.worker.finish_all()
    wait_until(lambda: receiver.got and not pending(hooked))
    (shown,) = webhook_of(hooked, job)["undelivered"]
    assert (shown["attempts"], shown["next_attempt"]) == (4, None)


def test_slow_receiver_does_not_block_others(hooked: Deployment, receiver: Receiver) -> None:
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


def test_message_has_its_tenant(hooked: Deployment, receiver: Receiver) -> None:
    receiver.statuses = [500] * 9
    receiver.block = threading.Event()
    hooked.submit("a", webhook={"url": receiver.url})
    hooked.worker.finish_all()
    wait_until(lambda: pending(hooked))
    assert [message.tenant for message in pending(hooked)] == ["local"]
    receiver.block.set()
    wait_until(lambda: not pending(hooked))


def test_reading_position_is_stored_periodically(
    hooked: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Outbox(hooked.settings.data / "webhooks")
    before = box.cursor()
    monkeypatch.setattr(sender, "CURSOR_SECONDS", -1.0)
    hooked.submit("a")  # without a webhook
    wait_until(lambda: box.cursor() != before)


@pytest.mark.parametrize("keep", [1, 100])
def test_dropped_events_are_logged(server: EmbeddedServer, tmp_path: Path, keep: int) -> None:
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
    warnings = [line for line in lines if line["event"].startswith("events are gone")]
    assert [line["read_until"] < line["oldest"] for line in warnings] == (
        [True] if keep == 1 else []
    )


def test_undelivered_messages_survive_a_restart(
    server: EmbeddedServer, tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "RETRY_SECONDS", (0, 1000))
    receiver.statuses = [500]
    with deployed(server.url, tmp_path, webhook_secret=SECRET) as first:
        wait_until(lambda: Outbox(tmp_path / "webhooks").cursor())
        first.submit("a", webhook={"url": receiver.url})
        first.worker.finish_all()
        wait_until(lambda: [message for message in pending(first) if message.attempt == 1])
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


def test_secret_is_created_once_and_private(tmp_path: Path) -> None:
    secret = kept_secret(tmp_path / "webhooks")
    assert kept_secret(tmp_path / "webhooks") == secret
    assert Webhook(secret).sign("msg_1", sender.datetime.now(sender.UTC), json.dumps({}))
    assert (tmp_path / "webhooks" / "secret").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_!"])
def test_invalid_secret_is_refused(secret: str) -> None:
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
def test_private_webhooks_need_loopback_without_keys(
    server: EmbeddedServer,
    tmp_path: Path,
    host: str,
    keys: int,
    private: bool | None,
    allowed: bool,
) -> None:
    if keys:
        KeyRing(tmp_path / "keys.json").add("alice")
    with deployed(server.url, tmp_path, host=host, webhook_private=private, start=False) as service:
        assert service.client.app.state.context.allows_private_webhooks is allowed


def test_refused_address_is_given_up_immediately(
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
    entries = [line for line in lines if line["event"].startswith("webhook")]
    assert [line["event"] for line in entries] == ["webhook given up"]
    assert "not a public address" in entries[0]["reason"]


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
        return "imagemill_webhooks_waiting 0.0" in text and all(line in text for line in lines)

    wait_until(counted)
