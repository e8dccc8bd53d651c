"""Wishes for previews: they reach the worker at its next beat, and expire."""

from jobs.job import Lease
from tests.jobs.bench import Bench


def wished(bench: Bench, *leases: Lease) -> frozenset[str]:
    """The images that a beat for these leases reports as wished for."""
    return bench.store.beat("w1", {(lease.key, lease.token): 0 for lease in leases}, 60).wished


def test_a_wish_reaches_only_the_worker_of_that_image(bench: Bench) -> None:
    job_id = bench.submit(2)
    leases = bench.claim(2)
    assert wished(bench, *leases) == frozenset()
    bench.store.want_preview(job_id, 1)
    assert wished(bench, *leases) == {f"{job_id}:1"}


def test_a_wish_expires(bench: Bench) -> None:
    job_id = bench.submit(1)
    lease = bench.claim_one()
    bench.store.want_preview(job_id, 0)
    [wishes] = bench.raw.keys("*wishes")
    assert 0 < bench.raw.pttl(wishes) <= 15_000
    bench.raw.zadd(wishes, {lease.key: 1})
    assert wished(bench, lease) == frozenset()


def test_a_wish_for_an_unknown_image_is_harmless(bench: Bench) -> None:
    bench.store.want_preview("unknown", 7)
    bench.submit(1)
    assert wished(bench, bench.claim_one()) == frozenset()
