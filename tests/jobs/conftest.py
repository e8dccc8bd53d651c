"""One embedded server per session, and a separate pool of keys per test.

Set `IMAGEMILL_TEST_SERVER` to test against another server program, such as Redis 7.0.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import redis

from jobs.queue.store import Store
from jobs.runtime.embedded_queue import EmbeddedServer
from tests.jobs.bench import Bench
from tests.waiting import LONG_PATIENCE


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    program = os.environ.get("IMAGEMILL_TEST_SERVER")
    binary = Path(program) if program else None
    with EmbeddedServer.ensure(tmp_path_factory.mktemp("queue"), binary) as server:
        yield server


@pytest.fixture
def pool() -> str:
    return uuid4().hex[:12]


@pytest.fixture
def bench(server: EmbeddedServer, pool: str) -> Iterator[Bench]:
    store = Store.connect(server.url, pool=pool)
    with redis.Redis.from_url(server.url, decode_responses=True, protocol=2) as raw:
        bench = Bench(store, raw, pool)
        yield bench
        bench.clear()
    store.close()


@pytest.fixture
def patient(server: EmbeddedServer, pool: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store of the bench's pool whose blocking reads outlast every wait in a test."""
    for module in ("jobs.queue.store", "jobs.queue.reader"):
        monkeypatch.setattr(f"{module}.LONGEST_BLOCK_SECONDS", LONG_PATIENCE)
    store = Store.connect(server.url, pool=pool, timeout=LONG_PATIENCE)
    yield store
    store.close()


@pytest.fixture
def store(bench: Bench) -> Store:
    return bench.store
