"""The connection: Redis errors become ours, and forgotten scripts are sent again."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis
from structlog.testing import capture_logs

from jobs.errors import ConfigurationError, StorageUnavailable
from jobs.queue.connection import Connection
from jobs.queue.store import Store
from jobs.runtime.embedded_queue import EmbeddedServer
from tests.jobs.bench import Bench
from tests.waiting import wait_until


def test_an_unreachable_server(tmp_path: Path) -> None:
    with pytest.raises(StorageUnavailable, match="cannot be reached"):
        Store.connect(f"unix://{tmp_path}/none.sock")


def test_an_invalid_url() -> None:
    with pytest.raises(ConfigurationError, match="redis_url"):
        Store.connect("nonsense://x")


SHORT = 1.0
"""Timeout, in seconds, for a server that never answers."""


def test_a_server_that_hangs(server: EmbeddedServer) -> None:
    store = Store.connect(server.url, timeout=SHORT)

    def answers() -> bool:
        try:
            store.ping()
        except StorageUnavailable:
            return False
        return True

    os.kill(server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(StorageUnavailable, match="did not answer in time"):
            store.ping()
    finally:
        os.kill(server.pid, signal.SIGCONT)
    wait_until(answers)
    store.close()


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("MISCONF Errors writing to the AOF file: No space left", "cannot write to its disk"),
        ("OOM command not allowed when used memory > 'maxmemory'.", "out of memory"),
        ("LOADING Valkey is loading the dataset in memory", "still loading its data"),
        ("READONLY You can't write against a read only replica.", "is a read-only replica"),
        ("BUSY Valkey is busy running a script.", "busy with a script"),
        ("CLUSTERDOWN The cluster is down", "cluster is down or moving keys"),
        ("TRYAGAIN Multiple keys request during rehashing of slot", "moving keys"),
        ("MOVED 3999 127.0.0.1:6381", "on another node"),
        ("ASK 3999 127.0.0.1:6381", "on another node"),
    ],
)
def test_a_refusal_is_storage_unavailable(
    store: Store, monkeypatch: pytest.MonkeyPatch, answer: str, sentence: str
) -> None:
    parser = redis.connection.DefaultParser
    error = parser.parse_error(answer)

    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(store._connection._client, "evalsha", refuse)
    with pytest.raises(StorageUnavailable, match=sentence):
        store.sweep()


def test_a_refusal_in_a_pipeline_is_storage_unavailable(bench: Bench) -> None:
    """Not mocked: another client's script keeps the server busy."""
    store, raw = bench.store, bench.raw

    def is_busy() -> bool:
        try:
            return raw.ping() is None
        except redis.ResponseError:
            return True

    raw.config_set("busy-reply-threshold", 1)
    with ThreadPoolExecutor(1) as thread:
        spinning = thread.submit(raw.eval, "while true do end", 0)
        wait_until(is_busy)
        try:
            for read in (lambda: store.job("x", None), lambda: store.jobs("ann"), store.sweep):
                with pytest.raises(StorageUnavailable, match="busy with a script"):
                    read()
        finally:
            raw.script_kill()
            assert "killed" in str(spinning.exception())
            raw.config_set("busy-reply-threshold", 5000)


def test_out_of_memory_leaves_nothing_half_done(server: EmbeddedServer, bench: Bench) -> None:
    """Not mocked: the server refuses the script's first write, so nothing is written."""
    bench.submit(1)
    before = bench.all_keys()
    bench.raw.config_set("maxmemory", 1)
    try:
        with pytest.raises(StorageUnavailable, match="out of memory"):
            bench.submit(5)
        with pytest.raises(StorageUnavailable, match="out of memory"):
            bench.claim(1)
    finally:
        bench.raw.config_set("maxmemory", 0)
    assert bench.all_keys() == before
    assert bench.make_all() == 1


def test_our_own_mistakes_are_not_hidden(bench: Bench) -> None:
    bench.raw.set(bench.key("quota"), "not a hash")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        bench.submit(1)


def test_forgotten_scripts_are_loaded_again(bench: Bench) -> None:
    job_id = bench.submit(4)
    for _ in range(2):
        bench.raw.script_flush()
        bench.commit(*bench.claim(2))
    assert bench.store.job(job_id, None).state == "succeeded"


@pytest.mark.parametrize(
    ("info", "warning"),
    [
        ({"maxmemory_policy": "allkeys-lru", "aof_enabled": 1}, "may evict jobs"),
        ({"maxmemory_policy": "noeviction", "aof_enabled": 0}, "append-only file is off"),
        ({"maxmemory_policy": "noeviction", "aof_enabled": 1}, None),
        ({"maxmemory_policy": "noeviction", "aof_enabled": 0, "loading": 1}, None),
    ],
)
def test_settings_that_can_lose_jobs_are_logged(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, info: dict, warning: str | None
) -> None:
    connection = Connection(server.url, "p", 5)
    monkeypatch.setattr(connection, "ask", lambda _: {"redis_version": "7.0.0", **info})
    with capture_logs() as logs:
        connection.check_server()
    assert [warning in log["event"] for log in logs] == ([True] if warning else [])
    connection.close()


def test_an_old_server_is_refused(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = Connection(server.url, "p", 5)
    monkeypatch.setattr(connection, "ask", lambda _: {"redis_version": "6.2.14"})
    with pytest.raises(ConfigurationError, match=r"version 6\.2\.14; 7\.0 or later"):
        connection.check_server()
    connection.close()


def test_long_waits_are_cut_short(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    timeouts = []
    monkeypatch.setattr(
        store._connection._blocking, "blpop", lambda _, seconds: timeouts.append(seconds)
    )
    store.wait("demo", 60)
    assert timeouts[0] < 5
