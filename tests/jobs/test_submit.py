"""submit: whole or not at all, once per Idempotency-Key, within the quota."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from jobs.errors import IdempotencyMismatch, InvalidRequest, QuotaExceeded
from jobs.job import State
from jobs.queue.store import Store
from jobs.request import MAX_SEED
from tests.jobs.bench import Bench, request


def test_a_new_job_is_queued_with_everything_submitted(bench: Bench) -> None:
    requests = [request(prompt="eins", seed=MAX_SEED), request(prompt="zwei 🟥\x00\n", steps=3)]
    job_id = bench.submit(requests, priority=7, metadata={"a": [], "b": {}}, spec={"webhook": None})

    job = bench.store.job(job_id, "ann")
    assert (job.state, job.tenant, job.priority, job.model) == (State.QUEUED, "ann", 7, "demo")
    assert (job.counts.total, job.counts.queued, job.progress) == (2, 2, 0.0)
    assert (job.started, job.finished, job.expires) == (None, None, None)
    assert job.metadata == {"a": [], "b": {}}
    assert bench.store.spec(job_id) == {"webhook": None}
    assert [image.request for image in bench.store.images(job_id)] == requests
    assert [lease.request for lease in bench.claim(2)] == requests


def test_the_same_key_finds_the_same_job(bench: Bench) -> None:
    once = {"idempotency": ("key", "hash")}
    job_id = bench.submit(3, **once)
    assert bench.submit(3, **once) == job_id
    assert bench.quota() == 3
    again = bench.store.submit(
        [request()], tenant="ann", priority=5, metadata={}, spec={}, quota=9, keep_seconds=1,
        max_attempts=1, **once,
    )  # fmt: skip
    assert (again.job_id, again.created) == (job_id, False)


def test_the_same_key_with_another_body_is_refused(bench: Bench) -> None:
    bench.submit(idempotency=("key", "hash"))
    with pytest.raises(IdempotencyMismatch, match="a different body"):
        bench.submit(idempotency=("key", "other"))
    assert bench.quota() == 1


def test_a_key_belongs_to_its_tenant(bench: Bench) -> None:
    mine = bench.submit(tenant="ann", idempotency=("key", "hash"))
    assert bench.submit(tenant="bob", idempotency=("key", "other")) != mine


def test_the_key_of_a_deleted_job_makes_a_new_one(bench: Bench) -> None:
    job_id = bench.submit(idempotency=("key", "hash"))
    bench.store.delete(job_id, "ann")
    assert bench.submit(idempotency=("key", "hash")) != job_id


def test_a_resent_call_makes_one_job(bench: Bench, monkeypatch) -> None:
    """If a reply is lost, the client sends the same script call again."""
    run = bench.store._connection.run
    monkeypatch.setattr(bench.store._connection, "run", lambda *args: (run(*args), run(*args))[1])
    bench.submit(5)
    assert bench.quota() == 5
    assert len(bench.store.jobs("ann")[0]) == 1


def test_over_the_quota_nothing_is_left_behind(bench: Bench) -> None:
    bench.submit(3, quota=5)
    before = bench.all_keys()
    with pytest.raises(
        QuotaExceeded, match="3 images plus 3 unfinished ones exceed the quota of 5"
    ):
        bench.submit(3, quota=5, idempotency=("key", "hash"))
    assert bench.all_keys() == before
    bench.submit(2, quota=5, idempotency=("key", "hash"))
    bench.submit(5, quota=5, tenant="bob")


def test_the_quota_is_free_again_once_images_are_made(bench: Bench) -> None:
    bench.submit(5, quota=5)
    bench.commit(*bench.claim(2))
    assert bench.quota() == 3
    bench.submit(2, quota=5)


@pytest.mark.parametrize(
    "wrong",
    [{"tenant": ""}, {"priority": 10}, {"priority": 1.5}, {"weight": 0}, {"weight": float("inf")}],
)
def test_invalid_arguments_are_refused(bench: Bench, wrong: dict) -> None:
    with pytest.raises(ValueError, match="a job needs a tenant"):
        bench.submit(**wrong)


def test_jobs_without_images_or_of_two_models_are_refused(bench: Bench) -> None:
    with pytest.raises(InvalidRequest):
        bench.submit([])
    with pytest.raises(ValueError, match="one model"):
        bench.submit([request(), request(model="other")])


def test_ten_thousand_images_are_one_script_and_few_keys(bench: Bench) -> None:
    requests = [request(prompt="a long prompt " * 15, seed=seed) for seed in range(10_000)]
    bench.raw.config_resetstat()
    job_id = bench.submit(requests)
    stats = bench.raw.info("commandstats")
    scripts = [stats[name] for name in ("cmdstat_eval", "cmdstat_evalsha") if name in stats]
    assert sum(script["calls"] for script in scripts) == 1
    assert bench.store.image(job_id, 9_999).request.seed == 9_999
    assert len(bench.all_keys() - {"events", "quota", "depth", "times"}) <= 8


def test_submitting_from_two_threads(store: Store) -> None:
    with ThreadPoolExecutor(4) as threads:
        jobs = list(threads.map(lambda _: Bench(store, None, "x").submit(2), range(40)))
    assert len(set(jobs)) == 40
