"""What was acknowledged outlives the queue server's process."""

import os
import signal
from pathlib import Path

import redis

from jobs.embedded import EmbeddedServer
from jobs.store import Commit, Store
from tests.jobs.bench import Bench


def test_a_killed_server_loses_no_acknowledged_job(tmp_path: Path) -> None:
    """Every move that was answered before the SIGKILL stands after it, through the same client."""
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
