"""Every key is bounded or expires."""

import re
from pathlib import Path

import jobs
from jobs.queue.keys import FOREVER, LIFETIMES_MS, NAMES, Keys
from jobs.reports import ModelCard, WorkerReport
from tests.jobs.bench import Bench, request


def busy_day(bench: Bench) -> None:
    """Put jobs through every kind of move, until nothing is queued or running."""
    bench.store.register("w1", WorkerReport("demo"), 60)
    bench.store.publish_card("demo", ModelCard())
    jobs = [bench.submit(6, tenant=tenant, priority=priority, idempotency=(tenant, "x"))
            for tenant, priority in (("ann", 1), ("bob", 5), ("cy", 9))]  # fmt: skip
    bench.submit([request(model="other")] * 3)
    leases = bench.claim(12, held=())
    bench.store.fail(leases[0], "bad", again=False)
    bench.store.fail(leases[1], "busy", again=True, delay_seconds=0.001)
    bench.store.release(leases[2:4])
    bench.lose(*leases[4:6])
    bench.store.sweep()
    bench.store.cancel(jobs[0], None)
    bench.store.delete(jobs[1], None)
    bench.store.retry(jobs[0], None)
    bench.raw.zadd(bench.key("delayed"), {jobs[2]: 1}, xx=True)
    while bench.make_all() or bench.store.claim(
        "other", "w2", limit=1, lease_seconds=60, nonce="n"
    ):
        bench.commit(*bench.claim(9, model="other", worker="w2", held=()))
        bench.commit(*leases)


def test_at_rest_every_key_is_bounded_or_expires(bench: Bench) -> None:
    busy_day(bench)
    for name in bench.all_keys() - FOREVER:
        assert bench.raw.pttl(bench.key.prefix + name) > 0, name
    for empty in ("quota", "leases", "delayed"):
        assert not bench.raw.exists(bench.key(empty))


def test_permanent_keys_are_listed(bench: Bench) -> None:
    assert set(NAMES) > FOREVER
    assert all("%s" not in NAMES[name] for name in FOREVER)


def test_a_finished_job_expires(bench: Bench) -> None:
    job_id = bench.submit(2, keep_seconds=100)
    bench.make_all()
    longest = 100_000 + LIFETIMES_MS["job_grace"]
    for name in ("job", "requests", "images"):
        assert 100_000 < bench.raw.pttl(bench.key(name, job_id)) <= longest


def test_a_list_of_jobs_does_not_expire_while_one_is_unfinished(bench: Bench) -> None:
    index = bench.key("jobs", "ann")
    bench.submit(1)
    bench.make_all()
    assert bench.raw.pttl(index) > 0
    bench.submit(1)
    assert bench.raw.pttl(index) == -1


def test_an_unfinished_job_does_not_expire(bench: Bench) -> None:
    job_id = bench.submit(2)
    bench.claim_one()
    names = [bench.key(name, job_id) for name in ("job", "requests", "images", "steps")]
    assert [bench.raw.ttl(name) for name in (*names, bench.key("jobs", "ann"))] == [-1] * 5


def test_all_keys_share_a_slot() -> None:
    assert Keys("p")("job", "j1") == "im:{p}:job:j1"
    assert Keys("p")("fair", "m", 5, "100% a:b") == "im:{p}:fair:m:5:100% a:b"


def test_scripts_use_only_listed_keys() -> None:
    used = set()
    for path in (Path(jobs.__file__).parent / "queue" / "lua").glob("*.lua"):
        text = path.read_text()
        assert text.startswith("-- "), f"{path.name} has no header"
        used |= set(re.findall(r"\bkey\('(\w+)'", text))
    assert used - {"keys"} <= set(NAMES)


def test_a_tenant_may_have_any_name(bench: Bench) -> None:
    for tenant in ("100%", "a:b", "ü {x}", "n:c", "-inf", "x" * 300):
        job_id = bench.submit(2, tenant=tenant)
        assert bench.store.position(job_id) is not None
    assert bench.make_all() == 12
