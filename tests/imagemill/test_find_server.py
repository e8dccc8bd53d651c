"""How long a command waits for the server of a data folder, and what it prints meanwhile."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from imagemill.client.errors import ServerUnreachable, StartFailed
from imagemill.local import find_server
from imagemill.local.up_lock import Record, announce, claimed, withdraw
from imagemill.terminal.interrupts import Interrupts
from tests.imagemill.fake_server import FakeServer


class Clock:
    """Replaces `Interrupts`; its pauses advance the time."""

    def __init__(self) -> None:
        self.now = 0.0

    def pause(self, seconds: float) -> None:
        self.now += seconds

    def asked(self) -> bool:
        return False


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


@pytest.mark.parametrize(("until", "ends"), [(100, True), (10**6, False)])
def test_a_wait_repeats_its_message_until_the_limit(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, until: int, ends: bool
) -> None:
    monkeypatch.setattr(find_server, "time", SimpleNamespace(monotonic=lambda: clock.now))
    said: list[str] = []
    with nullcontext() if ends else pytest.raises(StartFailed, match="not yet"):
        find_server._until(
            lambda: clock.now >= until, 1800, "not yet", said.append, cast(Interrupts, clock)
        )
    assert set(said) == {"not yet"}
    assert len(said) == (3 if ends else 59)


def test_a_local_server_is_retried_while_its_up_is_running(
    clock: Clock, server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("IMAGEMILL_SERVER", raising=False)
    notes: list[str] = []
    where: tuple[Any, ...] = (None, tmp_path, tmp_path / "models.toml", lambda _: None)
    with claimed(tmp_path):
        announce(tmp_path, Record(1, server.url, False))
        with find_server.server_for(*where, notes.append, cast(Interrupts, clock)) as (client, _):
            server.script = [(503, {"Retry-After": "5"})] * 60
            assert client.get("/v1/jobs")["data"] == []
            assert clock.now >= 60 * 5
            assert set(notes) == {find_server.WAITING}
            server.script = [(503, {})] * 60
            withdraw(tmp_path)
            with pytest.raises(ServerUnreachable, match="has ended"):
                client.get("/v1/jobs")
