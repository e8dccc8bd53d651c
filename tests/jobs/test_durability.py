"""Acknowledged data survives a crash of the queue server."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import redis

from jobs.errors import ConfigurationError
from jobs.queue.store import Commit, Store
from jobs.runtime.embedded_queue import EmbeddedServer, find_binary
from tests.jobs.bench import Bench, request
from tests.waiting import wait_until


def test_a_killed_server_loses_no_acknowledged_job(tmp_path: Path) -> None:
    """Every move answered before the SIGKILL is still there afterwards, through the same client."""
    server = EmbeddedServer.ensure(tmp_path)
    store = Store.connect(server.url)
    bench = Bench(store, redis.Redis.from_url(server.url, decode_responses=True), "default")
    jobs = [bench.submit(5, idempotency=(str(number), "x")) for number in range(20)]
    leases = bench.claim(10)
    assert set(bench.commit(*leases[:5])) == {Commit.COMMITTED}
    before = [store.job(job, "ann") for job in jobs]

    os.kill(server.pid, signal.SIGKILL)
    with EmbeddedServer.ensure(tmp_path):
        assert [store.job(job, "ann") for job in jobs] == before
        assert bench.submit(5, idempotency=("7", "x")) == jobs[7]
        assert set(bench.commit(*leases)) == {Commit.ALREADY_YOURS, Commit.COMMITTED}
        assert bench.make_all() == 90
        assert {store.job(job, "ann").state for job in jobs} == {"succeeded"}
        assert bench.quota() == 0
    store.close()
    bench.raw.close()
    server.stop()


@pytest.mark.parametrize("attempt", range(3))
def test_a_server_killed_right_after_an_answer_kept_the_data(tmp_path: Path, attempt: int) -> None:
    """The worst moment: the large job's sync is still running while the small ones are answered.

    A server that syncs once per second wouldn't even have written the small ones by then.
    """
    server = EmbeddedServer.ensure(tmp_path)
    store = Store.connect(server.url)
    bench = Bench(store, redis.Redis.from_url(server.url, decode_responses=True), "default")
    seconds, _ = bench.raw.time()
    wait_until(lambda: bench.raw.time()[0] > seconds + 1)  # its last sync was a second ago
    jobs = [bench.submit([request(prompt="x" * 2000)] * 5000), bench.submit(1), bench.submit(1)]
    os.kill(server.pid, signal.SIGKILL)
    server.stop()
    with EmbeddedServer.ensure(tmp_path):
        assert {job.id for job in store.jobs("ann")[0]} == set(jobs)
    store.close()
    bench.raw.close()


def test_a_damaged_log_end_is_refused_and_can_be_repaired(tmp_path: Path) -> None:
    """The fix in docs/operating.md: the server's own program, under another name, truncates it."""
    with EmbeddedServer.ensure(tmp_path) as server:
        store = Store.connect(server.url)
        bench = Bench(store, redis.Redis.from_url(server.url, decode_responses=True), "default")
        job_id = bench.submit(3)
        store.close()
        bench.raw.close()
    [log] = (tmp_path / "appendonlydir").glob("*.incr.aof")
    with log.open("ab") as file:
        file.write(bytes(4096))
    with pytest.raises(ConfigurationError, match="Bad file format"):
        EmbeddedServer.ensure(tmp_path)

    check = tmp_path / "valkey-check-aof"
    check.symlink_to(find_binary())
    subprocess.run([check, "--fix", log], input="y\n", text=True, check=True, capture_output=True)
    with EmbeddedServer.ensure(tmp_path) as server:
        store = Store.connect(server.url)
        assert store.job(job_id, None).counts.queued == 3
        store.close()
