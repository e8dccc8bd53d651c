"""claim: which images a worker gets, and that a lost reply loses nothing."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest

from jobs.errors import Conflict
from jobs.queue.store import Commit, Store
from tests.jobs.bench import Bench, request
from tests.waiting import LONG_PATIENCE, PATIENCE, wait_until


def test_leases_come_in_index_order_with_all_fields(bench: Bench) -> None:
    job_id = bench.submit(3, priority=8)
    first, second = bench.claim(2)
    assert first.priority == 8
    assert (first.key, second.key) == (f"{job_id}:0", f"{job_id}:1")
    assert (first.attempt, first.solo, first.request) == (1, False, request())
    assert first.token != second.token
    assert bench.states(job_id) == ["running", "running", "queued"]
    job = bench.store.job(job_id, "ann")
    assert job.state == "running"
    assert job.started is not None


def test_a_model_without_work_gives_no_leases(bench: Bench) -> None:
    bench.submit(1)
    assert bench.claim(5, model="other") == []
    assert len(bench.claim(5)) == 1
    assert bench.claim(5) == []


def test_no_image_is_leased_twice(bench: Bench) -> None:
    bench.submit(200)
    with ThreadPoolExecutor(4) as threads:
        claims = threads.map(lambda n: bench.claim(7, worker=f"w{n}"), range(40))
        keys = [lease.key for leases in claims for lease in leases]
    assert len(keys) == len(set(keys)) == 200


def test_the_same_nonce_returns_the_same_leases(bench: Bench) -> None:
    bench.submit(5)
    leases = bench.claim(2, nonce="n")
    again = bench.claim(2, nonce="n", held=())
    assert [replace(lease, age=0) for lease in again] == [replace(lease, age=0) for lease in leases]
    assert len(bench.claim(9)) == 3


def test_the_same_nonce_leaves_out_finished_images(bench: Bench) -> None:
    bench.submit(2)
    finished, unfinished = bench.claim(2, nonce="n")
    bench.commit(finished)
    [again] = bench.claim(2, nonce="n")
    assert again.token == unfinished.token


def test_leases_of_a_lost_reply_go_back_at_the_next_claim(bench: Bench) -> None:
    job_id = bench.submit(3)
    bench.claim(2, nonce="lost")
    [again] = bench.claim(1, nonce="next", held=())
    assert (again.key, again.attempt) == (f"{job_id}:0", 1)
    assert bench.counts(job_id) == {"queued": 2, "running": 1}


def test_held_leases_stay(bench: Bench) -> None:
    job_id = bench.submit(3)
    held = [lease.key for lease in bench.claim(2, nonce="got")]
    [third] = bench.claim(1, nonce="next", held=held)
    assert third.key == f"{job_id}:2"
    assert bench.counts(job_id) == {"running": 3}


def test_one_workers_claim_leaves_anothers_alone(bench: Bench) -> None:
    job_id = bench.submit(2)
    bench.claim(1, worker="w1")
    bench.claim(1, worker="w2", held=())
    assert bench.counts(job_id) == {"running": 2}


def test_an_image_that_the_worker_still_holds_is_not_leased_to_it(bench: Bench) -> None:
    job_id = bench.submit(1)
    old = bench.claim_one()
    bench.store.cancel(job_id, "ann")
    bench.store.retry(job_id, "ann")
    assert bench.claim(1, held=[old.key]) == []
    assert bench.claim_one(worker="w2").key == old.key


def test_a_preferred_size_overtakes_a_little(bench: Bench) -> None:
    wide = bench.submit([request(width=256, height=64)] * 20)
    square = bench.submit([request()] * 20)
    preferred = {"prefer": (128, 128)}
    claimed = [bench.claim_one(**preferred).job_id for _ in range(40)]
    assert claimed[0] == square
    most_ahead = max(
        claimed[:n].count(square) - claimed[:n].count(wide)
        for n in range(41)
        if claimed[:n].count(square) < 20
    )
    assert 3 <= most_ahead <= 5


def test_a_preferred_size_of_another_tenant_counts_too(bench: Bench) -> None:
    bench.submit([request(width=256, height=64)] * 5, tenant="ann")
    square = bench.submit(5, tenant="bob")
    assert bench.claim_one(prefer=(128, 128)).job_id == square
    assert bench.claim_one(prefer=(256, 64)).job_id != square


def test_a_stalled_image_is_leased_alone(bench: Bench) -> None:
    job_id = bench.submit(4)
    poisoned = bench.claim(2, worker="dead")[1]
    bench.lose(poisoned)
    bench.store.sweep()

    [alone] = bench.claim(4)
    assert (alone.key, alone.solo, alone.attempt) == (poisoned.key, True, 1)
    assert [lease.solo for lease in bench.claim(4)] == [False, False]
    assert bench.counts(job_id) == {"running": 4}


def test_a_stalled_image_is_not_added_to_a_batch(bench: Bench) -> None:
    first, second = bench.submit(2), bench.submit(2)
    lost = bench.claim(2, worker="dead")[1]
    bench.lose(lost)
    bench.store.sweep()
    assert lost.job_id == second
    assert [lease.job_id for lease in bench.claim(4)] == [first]
    assert [lease.key for lease in bench.claim(4)] == [lost.key]


def test_a_full_worker_joins_jobs_it_holds_nothing_of(bench: Bench) -> None:
    mine = bench.submit(5)
    held = [lease.key for lease in bench.claim(2)]
    others = {bench.submit(3), bench.submit(3, tenant="bob")}
    joined = bench.claim(2, held=held, joins_from=5)
    assert {lease.job_id for lease in joined} == others
    held += [lease.key for lease in joined]
    assert bench.claim(2, held=held, joins_from=5) == []
    assert bench.counts(mine) == {"queued": 3, "running": 2}


def test_a_full_worker_that_holds_some_of_every_job_joins_none(bench: Bench) -> None:
    job_id = bench.submit(5)
    [lease] = bench.claim(1)
    assert bench.claim(4, held=[lease.key], joins_from=0) == []
    assert bench.counts(job_id) == {"queued": 4, "running": 1}


@pytest.mark.parametrize(("joins_from", "expected"), [(4, 1), (6, 1), (7, 0)])
def test_joined_images_have_at_least_the_given_priority(
    bench: Bench, joins_from: int, expected: int
) -> None:
    bench.submit(2)
    bench.claim(1)
    bench.submit(1, priority=6)
    assert len(bench.claim(1, joins_from=joins_from)) == expected


def test_a_stalled_image_is_not_joined(bench: Bench) -> None:
    bench.submit(1)
    bench.lose(*bench.claim(1, worker="dead"))
    bench.store.sweep()
    bench.submit(1)
    assert [lease.solo for lease in bench.claim(2, joins_from=5)] in ([], [False])


def test_requeued_images_come_before_untouched_ones(bench: Bench) -> None:
    job_id = bench.submit(20)
    leases = bench.claim(12)
    bench.store.release([leases[11], leases[2], leases[10]])
    assert [lease.index for lease in bench.claim(4, worker="w2")] == [2, 10, 11, 12]
    bench.store.release([leases[0]])
    assert [lease.index for lease in bench.claim(2, worker="w3")] == [0, 13]
    assert bench.counts(job_id) == {"running": 14, "queued": 6}


@pytest.mark.parametrize(("meanwhile", "claimed"), [("time", 1), ("images", 4)])
def test_lingering_ends_when_its_time_is_over_or_the_batch_is_full(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, meanwhile: str, claimed: int
) -> None:
    bench.submit(1)
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3 and meanwhile == "time":
            bench.raw.hset(bench.key("times"), "demo", 1)
        elif len(naps) == 3:
            bench.submit(3)

    monkeypatch.setattr("jobs.queue.store.time", SimpleNamespace(sleep=nap))
    assert len(bench.claim(4, linger_seconds=LONG_PATIENCE)) == claimed
    assert len(naps) == 3
    assert 0 < min(naps) <= max(naps) <= 0.02


def test_a_bell_wakes_a_waiting_worker(bench: Bench, patient: Store) -> None:
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(patient.wait, "demo", LONG_PATIENCE)
        wait_until(lambda: bench.raw.info("clients")["blocked_clients"])
        bench.submit(1)
        waiting.result(PATIENCE)


def test_waiting_without_work_times_out(patient: Store) -> None:
    """It ends after the requested time, which is far shorter than the longest possible one."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(patient.wait, "demo", 0.05).result(PATIENCE)


@pytest.mark.parametrize("gone", ["job", "requests"])
def test_jobs_that_vanished_are_dropped_from_the_queue(bench: Bench, gone: str) -> None:
    """Jobs vanish when a server loses the end of its log."""
    lost, intact = bench.submit(3), bench.submit(3)
    bench.raw.delete(bench.key(gone, lost))
    assert {lease.job_id for lease in bench.claim(9)} == {intact}
    assert bench.store.queue_depth() == {}
    assert bench.claim(9) == []


def test_a_job_without_its_requests_is_cancelled_and_frees_its_quota(bench: Bench) -> None:
    """Requests vanish from a server that evicts: one image runs, one waits for a retry."""
    lost = bench.submit(4, keep_seconds=100)
    running, failed = bench.claim(2)
    bench.store.fail(failed, "busy", again=True, delay_seconds=600)
    bench.raw.delete(bench.key("requests", lost))
    assert bench.claim(2, worker="w2") == []
    job = bench.store.job(lost, "ann")
    assert (job.state, job.progress, job.counts.cancelled) == ("cancelled", 0.0, 4)
    assert bench.quota() == 0
    assert bench.commit(running) == [Commit.STALE]
    assert bench.raw.pttl(bench.key("job", lost)) > 0
    assert not bench.raw.exists(bench.key("delayed"), bench.key("leases"))
    with pytest.raises(Conflict):
        bench.store.retry(lost, "ann")


def test_images_without_their_requests_can_still_be_finished(bench: Bench) -> None:
    job_id = bench.submit(2)
    finished, failed = bench.claim(2, nonce="n")
    bench.raw.delete(bench.key("requests", job_id))
    assert bench.commit(finished) == [Commit.COMMITTED]
    assert bench.store.fail(failed, "bad", again=False)
    job = bench.store.job(job_id, "ann")
    assert (job.state, job.progress) == ("failed", 1.0)
    assert (job.counts.succeeded, job.counts.failed, bench.quota()) == (1, 1, 0)


def test_leases_without_their_requests_are_not_handed_over_again(bench: Bench) -> None:
    job_id = bench.submit(2)
    bench.claim(2, nonce="n")
    bench.raw.delete(bench.key("requests", job_id))
    assert bench.claim(2, nonce="n", held=()) == []
    assert bench.store.job(job_id, "ann").state == "cancelled"


def test_a_band_with_only_vanished_jobs_is_emptied(bench: Bench) -> None:
    lost = bench.submit(3)
    bench.raw.delete(bench.key("job", lost))
    assert bench.claim(9) == []
    assert bench.store.queue_depth() == {}
