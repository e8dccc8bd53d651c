"""beat, commit, fail, release and sweep: only the current token's holder can move an image."""

import pytest

from jobs.job import Lease
from jobs.queue.store import Beat, Commit
from tests.jobs.bench import Bench, request, result
from tests.waiting import wait_until

OK = Beat(frozenset(), frozenset())


def beat(bench: Bench, step: int, *leases: Lease, seconds: float = 60) -> Beat:
    return bench.store.beat("w1", {(lease.key, lease.token): step for lease in leases}, seconds)


def test_a_beat_reports_steps_and_progress(bench: Bench) -> None:
    job_id = bench.submit([request(steps=8), request(steps=12)])
    leases = bench.claim(2)
    version = bench.store.job(job_id, None).version
    assert beat(bench, 5, *leases) == OK
    job = bench.store.job(job_id, None)
    assert job.progress == 10 / 20
    assert job.version != version
    assert [image.step for image in bench.store.images(job_id)] == [5, 5]


def test_a_job_starts_once(bench: Bench) -> None:
    job_id = bench.submit(2)
    bench.claim_one()
    started = bench.store.job(job_id, None).started
    wait_until(lambda: bench.raw.time()[1] // 1000 != round(started % 1 * 1000))
    bench.claim_one()
    assert bench.store.job(job_id, None).started == started


def test_a_beat_without_news_changes_no_version(bench: Bench) -> None:
    job_id = bench.submit(1)
    lease = bench.claim_one()
    beat(bench, 5, lease)
    version = bench.store.job(job_id, None).version
    assert beat(bench, 5, lease) == OK
    assert bench.store.job(job_id, None).version == version


def test_a_lease_has_the_age_of_its_job(bench: Bench) -> None:
    job_id = bench.submit(1)
    created = bench.store.job(job_id, None).created
    wait_until(lambda: bench.raw.time()[0] + bench.raw.time()[1] / 1e6 > created + 0.05)
    before = bench.raw.time()
    age = bench.claim_one().age
    after = bench.raw.time()
    assert before[0] + before[1] / 1e6 - 0.001 <= created + age <= after[0] + after[1] / 1e6


def test_a_beat_extends_the_lease(bench: Bench) -> None:
    bench.submit(2)
    extended, lost = bench.claim(2)
    bench.lose(extended, lost)
    beat(bench, 1, extended)
    assert bench.store.sweep() == 1
    assert beat(bench, 2, extended, lost) == Beat(frozenset({lost.key}), frozenset())


def test_a_beat_reports_cancelled_deleted_and_committed_images(bench: Bench) -> None:
    cancelled, deleted, done = (bench.submit(1) for _ in range(3))
    leases = bench.claim(3)
    bench.store.cancel(cancelled, None)
    bench.store.delete(deleted, None)
    bench.commit(*(lease for lease in leases if lease.job_id == done))
    answer = beat(bench, 1, *leases)
    assert answer == Beat(frozenset({f"{deleted}:0", f"{done}:0"}), frozenset({f"{cancelled}:0"}))


def test_a_beat_without_leases_does_nothing(bench: Bench) -> None:
    assert bench.store.beat("w1", {}, 60) == OK


def test_a_wish_for_a_preview_reaches_the_worker_for_a_while(bench: Bench) -> None:
    job_id = bench.submit(2)
    first, second = bench.claim(2)
    assert beat(bench, 1, first, second).wished == frozenset()
    bench.store.want_preview(job_id, 0)
    assert beat(bench, 1, first, second) == Beat(frozenset(), frozenset(), frozenset({first.key}))
    bench.raw.zadd(bench.key("wishes"), {first.key: 1})
    assert beat(bench, 1, first, second) == OK


def test_wishes_for_unknown_images_expire(bench: Bench) -> None:
    bench.store.want_preview("nonsense", 7)
    bench.raw.zadd(bench.key("wishes"), {"nonsense:7": 1})
    bench.store.want_preview("nonsense", 8)
    assert bench.raw.zrange(bench.key("wishes"), 0, -1) == ["nonsense:8"]
    assert 0 < bench.raw.pttl(bench.key("wishes")) <= 15_000


def test_a_commit_finishes_the_image(bench: Bench) -> None:
    job_id = bench.submit(2)
    lease = bench.claim_one()
    assert bench.commit(lease) == [Commit.COMMITTED]
    image = bench.store.image(job_id, 0)
    assert (image.state, image.step, image.attempts) == ("succeeded", 8, 1)
    assert image.result == result(lease)
    job = bench.store.job(job_id, None)
    assert (job.state, job.progress, job.finished) == ("running", 0.5, None)


def test_the_last_commit_finishes_the_job(bench: Bench) -> None:
    job_id = bench.submit(2, keep_seconds=100)
    bench.commit(*bench.claim(2))
    job = bench.store.job(job_id, None)
    assert (job.state, job.progress) == ("succeeded", 1.0)
    assert job.finished is not None
    assert job.expires == pytest.approx(job.finished + 100)
    assert bench.quota() == 0


def test_a_repeated_commit_is_already_ours(bench: Bench) -> None:
    job_id = bench.submit(1)
    lease = bench.claim_one()
    assert bench.commit(lease, lease) == [Commit.COMMITTED, Commit.ALREADY_YOURS]
    assert bench.commit(lease) == [Commit.ALREADY_YOURS]
    assert bench.counts(job_id) == {"succeeded": 1}


def test_a_commit_after_the_lease_expired_counts_until_a_sweep(bench: Bench) -> None:
    bench.submit(1)
    lease = bench.claim_one()
    bench.lose(lease)
    assert bench.commit(lease) == [Commit.COMMITTED]
    assert bench.store.sweep() == 0


def test_a_late_commit_is_refused(bench: Bench) -> None:
    job_id = bench.submit(1)
    late = bench.claim_one()
    bench.lose(late)
    bench.store.sweep()
    assert bench.commit(late) == [Commit.STALE]
    now = bench.claim_one(worker="w2")
    assert bench.commit(late, now, late) == [Commit.STALE, Commit.COMMITTED, Commit.STALE]
    assert bench.store.image(job_id, 0).result == result(now)


@pytest.mark.parametrize("move", ["cancel", "delete", "release", "fail"])
def test_a_commit_after_another_move_is_refused(bench: Bench, move: str) -> None:
    job_id = bench.submit(1)
    lease = bench.claim_one()
    if move == "release":
        bench.store.release([lease])
    elif move == "fail":
        bench.store.fail(lease, "no", again=False)
    else:
        getattr(bench.store, move)(job_id, "ann")
    assert bench.commit(lease) == [Commit.STALE]


def test_a_forged_token_changes_nothing(bench: Bench) -> None:
    job_id = bench.submit(1)
    lease = bench.claim_one()
    forged = Lease(lease.job_id, lease.index, "1-00", 1, False, lease.request)
    assert bench.commit(forged) == [Commit.STALE]
    assert not bench.store.fail(forged, "no", again=True)
    assert bench.store.release([forged]) == 0
    assert beat(bench, 3, forged).lost == {lease.key}
    assert bench.counts(job_id) == {"running": 1}
    assert bench.commit(lease) == [Commit.COMMITTED]


def test_an_untouched_image_has_no_guessable_token(bench: Bench) -> None:
    job_id = bench.submit(1)
    guessed = Lease(job_id, 0, "", 1, False, request())
    assert bench.commit(guessed) == [Commit.STALE]
    assert not bench.store.fail(guessed, "no", again=True)


def test_a_failure_is_tried_again_while_attempts_are_left(bench: Bench) -> None:
    job_id = bench.submit(1, max_attempts=2)
    assert bench.store.fail(bench.claim_one(), "first", again=True)
    again = bench.claim_one(worker="w2")
    assert again.attempt == 2
    assert bench.store.fail(again, "second", again=True)
    image = bench.store.image(job_id, 0)
    assert (image.state, image.error, image.attempts) == ("failed", "second", 2)
    assert bench.store.job(job_id, None).state == "failed"
    assert bench.quota() == 0


def test_a_permanent_failure_is_final(bench: Bench) -> None:
    job_id = bench.submit(2)
    lease = bench.claim_one()
    assert bench.store.fail(lease, "bad \ud800 prompt", again=False)
    assert bench.store.image(job_id, 0).error == "bad \\ud800 prompt"
    bench.commit(bench.claim_one())
    job = bench.store.job(job_id, None)
    assert (job.state, job.progress) == ("failed", 1.0)
    assert bench.counts(job_id) == {"succeeded": 1, "failed": 1}


def test_a_failure_reported_twice_counts_once(bench: Bench) -> None:
    job_id = bench.submit(1, max_attempts=2)
    lease = bench.claim_one()
    assert bench.store.fail(lease, "no", again=True)
    assert bench.store.fail(lease, "no", again=True)
    assert bench.counts(job_id) == {"queued": 1}
    assert bench.claim_one(worker="w2").attempt == 2
    assert not bench.store.fail(lease, "no", again=True)


def test_a_delayed_image_waits_for_its_time(bench: Bench) -> None:
    job_id = bench.submit(1)
    bench.store.fail(bench.claim_one(), "busy", again=True, delay_seconds=600)
    assert bench.counts(job_id) == {"queued": 1}
    assert bench.store.job(job_id, None).state == "queued"
    assert bench.store.position(job_id) is None
    assert bench.claim(1, worker="w2") == []
    bench.raw.zadd(bench.key("later", job_id), {"0": 1})
    bench.raw.zadd(bench.key("delayed"), {job_id: 1})
    assert bench.claim_one(worker="w2").attempt == 2


def test_sweeping_wakes_delayed_images(bench: Bench) -> None:
    job_id = bench.submit(4)
    for lease in bench.claim(4):
        bench.store.fail(lease, "busy", again=True, delay_seconds=600)
    assert bench.store.sweep() == 0
    bench.raw.zadd(bench.key("later", job_id), {"0": 1, "2": 2, "3": 3})
    bench.raw.zadd(bench.key("delayed"), {job_id: 1})
    assert bench.store.sweep() == 3
    assert bench.store.queue_depth() == {"demo": {5: 3}}
    assert bench.raw.zrange(bench.key("delayed"), 0, -1) == [job_id]
    assert bench.raw.zscore(bench.key("delayed"), job_id) > 3
    assert [lease.index for lease in bench.claim(4, worker="w2")] == [0, 2, 3]


def test_the_earliest_delay_of_a_job_wakes_it(bench: Bench) -> None:
    bench.submit(2)
    first, second = bench.claim(2)
    bench.store.fail(first, "busy", again=True, delay_seconds=0.05)
    bench.store.fail(second, "busy", again=True, delay_seconds=600)
    assert wait_until(bench.store.sweep) == 1


def test_releasing_does_not_count_as_an_attempt(bench: Bench) -> None:
    job_id = bench.submit(2, max_attempts=1)
    for worker in ("w1", "w2", "w3"):
        leases = bench.claim(2, worker=worker)
        assert [lease.attempt for lease in leases] == [1, 1]
        assert bench.store.release(leases) == 2
        assert bench.store.release(leases) == 0
    assert bench.store.job(job_id, None).state == "queued"
    assert bench.counts(job_id) == {"queued": 2}


def test_releasing_resets_reported_steps(bench: Bench) -> None:
    job_id = bench.submit(1)
    lease = bench.claim_one()
    beat(bench, 6, lease)
    bench.store.release([lease])
    assert bench.store.job(job_id, None).progress == 0
    assert bench.store.image(job_id, 0).step == 0


def test_an_image_with_too_many_stalls_fails(bench: Bench) -> None:
    job_id = bench.submit(1, max_stalls=2, max_attempts=1)
    for stall in range(3):
        lease = bench.claim_one(worker=f"w{stall}")
        assert (lease.attempt, lease.solo) == (1, stall > 0)
        bench.lose(lease)
        assert bench.store.sweep() == 1
    image = bench.store.image(job_id, 0)
    assert (image.state, image.error) == ("failed", "its worker died or hung 3 times")
    assert bench.store.job(job_id, None).state == "failed"


def test_sweeping_leaves_valid_leases_alone(bench: Bench) -> None:
    job_id = bench.submit(3)
    leases = bench.claim(3)
    bench.lose(leases[1])
    assert bench.store.sweep() == 1
    assert bench.store.sweep() == 0
    assert bench.states(job_id) == ["running", "queued", "running"]


def test_a_lease_expires_by_the_servers_clock(bench: Bench) -> None:
    bench.submit(1)
    bench.claim_one(lease_seconds=0.05)
    assert wait_until(bench.store.sweep) == 1


def test_after_a_pause_the_first_worker_back_takes_no_leases(bench: Bench) -> None:
    """The queue was unavailable for longer than a lease, so every lease has expired."""
    job_id = bench.submit(3)
    mine, others, dead = (bench.claim_one(worker=f"w{n}", lease_seconds=3) for n in range(3))
    bench.store.sweep()
    bench.lose(mine, others, dead)
    beat(bench, 3, mine)
    assert bench.sweep_after(6.1) == 0
    assert beat(bench, 3, others) == OK
    assert wait_until(bench.store.sweep) == 1  # the dead worker's, after its grace
    assert bench.states(job_id) == ["running", "running", "queued"]
    assert bench.claim_one(worker="w3").key == dead.key


def test_the_grace_is_short_and_given_once(bench: Bench) -> None:
    bench.submit(2)
    lost, late = bench.claim(2, lease_seconds=60)
    bench.store.sweep()
    bench.lose(lost, late)
    assert bench.sweep_after(61) == 0
    seconds, micro = bench.raw.time()
    assert bench.raw.zscore(bench.key("leases"), lost.key) <= seconds * 1000 + micro / 1000 + 2000
    bench.lose(lost, late)
    assert bench.store.sweep() == 2


def test_leases_shorter_than_the_sweep_interval_still_expire(bench: Bench) -> None:
    bench.submit(1)
    lease = bench.claim_one(lease_seconds=1)
    bench.store.sweep()
    bench.lose(lease)
    assert bench.sweep_after(2.5) == 1


@pytest.mark.parametrize("swept", [True, False])
def test_without_a_pause_there_is_no_grace(bench: Bench, swept: bool) -> None:
    """Neither a dead worker nor a queue that was never swept counts as a pause."""
    bench.submit(1)
    lease = bench.claim_one(lease_seconds=60)
    bench.lose(lease)
    if swept:
        assert bench.sweep_after(59) == 1
    else:
        assert bench.store.sweep() == 1


def test_leases_of_jobs_that_vanished_are_swept(bench: Bench) -> None:
    job_id = bench.submit(1)
    lease = bench.claim_one()
    bench.raw.delete(bench.key("job", job_id))
    bench.lose(lease)
    assert bench.store.sweep() == 0
    assert bench.raw.zcard(bench.key("leases")) == 0
