"""cancel, retry, delete, and what happens to finished jobs."""

import pytest

from jobs.errors import Conflict, NotFound
from jobs.job import Undelivered
from jobs.queue.store import Commit
from tests.jobs.bench import Bench, request


def mixed(bench: Bench) -> str:
    """A job with succeeded, failed, delayed, released, running and untouched images."""
    job_id = bench.submit(7)
    succeeded, failed, delayed, released, _running = bench.claim(5)
    bench.commit(succeeded)
    bench.store.fail(failed, "bad", again=False)
    bench.store.fail(delayed, "busy", again=True, delay_seconds=600)
    bench.store.release([released])
    return job_id


def test_cancelling_stops_all_unfinished_images(bench: Bench) -> None:
    job_id = mixed(bench)
    job = bench.store.cancel(job_id, "ann")
    assert bench.states(job_id) == ["succeeded", "failed", *["cancelled"] * 5]
    assert (job.state, job.counts.cancelled) == ("failed", 5)
    assert job.progress == pytest.approx(2 / 7)  # of those that ended by themselves
    assert job.expires is not None
    assert bench.quota() == 0
    assert bench.store.queue_depth() == {}
    assert bench.claim(9, worker="w2") == []
    for name in ("leases", "delayed"):
        assert not bench.raw.exists(bench.key(name))


def test_cancelling_untouched_images_writes_no_records(bench: Bench) -> None:
    job_id = bench.submit(1000)
    assert bench.store.cancel(job_id, "ann").state == "cancelled"
    assert not bench.raw.exists(bench.key("images", job_id))
    assert set(bench.states(job_id)) == {"cancelled"}


def test_cancelling_leaves_other_jobs_in_the_queue(bench: Bench) -> None:
    first, second, other = bench.submit(5), bench.submit(5), bench.submit(5, tenant="bob")
    bench.store.cancel(first, "ann")
    assert bench.store.queue_depth() == {"demo": {5: 10}}
    assert {job for job, _ in bench.order(10)} == {second, other}


def test_cancelling_twice_changes_nothing(bench: Bench) -> None:
    job_id = bench.submit(2)
    first = bench.store.cancel(job_id, "ann")
    assert bench.store.cancel(job_id, "ann") == first
    done = bench.submit(1)
    bench.make_all()
    assert bench.store.cancel(done, "ann").state == "succeeded"


def test_a_resent_cancel_spares_retried_images(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = bench.submit(2)
    run = bench.store._connection.run

    def retried_in_between(*args: str | int) -> object:
        run(*args)
        run("retry", job_id, "ann", "another nonce")
        return run(*args)

    with monkeypatch.context() as patched:
        patched.setattr(bench.store._connection, "run", retried_in_between)
        assert bench.store.cancel(job_id, "ann").counts.queued == 2
    assert bench.store.cancel(job_id, "ann").counts.cancelled == 2


def test_a_cancelled_image_keeps_its_last_step(bench: Bench) -> None:
    job_id = bench.submit(1)
    lease = bench.claim_one()
    bench.store.beat("w1", {(lease.key, lease.token): 3}, 60)
    bench.store.cancel(job_id, "ann")
    assert bench.store.image(job_id, 0).step == 3


def test_a_cancelled_job_keeps_the_progress_that_was_made(bench: Bench) -> None:
    job_id = bench.submit([request(steps=steps) for steps in (4, 4, 8, 24)])
    finished, running, over = bench.claim(3)
    bench.commit(finished)
    # Some schedulers run more steps than the request says.
    bench.store.beat("w1", {(running.key, running.token): 1, (over.key, over.token): 9}, 60)
    assert bench.store.job(job_id, None).progress == pytest.approx(14 / 40)
    assert bench.store.cancel(job_id, "ann").progress == pytest.approx(13 / 40)
    assert bench.store.retry(job_id, "ann").progress == pytest.approx(4 / 40)
    bench.make_all()
    assert bench.store.job(job_id, None).progress == 1


def test_only_the_newest_undelivered_messages_are_shown(bench: Bench) -> None:
    job_id = bench.submit(1)
    for number in range(10, 35):
        message = Undelivered(f"msg_{number}", "image.failed", 1, 1.25, "no", 2.5)
        bench.store.undelivered(job_id, message)
    shown = bench.store.job(job_id, None).undelivered
    assert [message.id for message in shown] == [f"msg_{number}" for number in range(15, 35)]
    assert shown[-1] == message
    bench.store.undelivered("gone", message)
    assert not bench.raw.exists(bench.key("job", "gone"))


def test_retrying_queues_failed_and_cancelled_images(bench: Bench) -> None:
    job_id = mixed(bench)
    bench.store.cancel(job_id, "ann")
    job = bench.store.retry(job_id, "ann")
    assert bench.states(job_id) == ["succeeded", *["queued"] * 6]
    assert (job.state, job.progress) == ("running", pytest.approx(1 / 7))
    assert (job.finished, job.expires) == (None, None)
    assert bench.quota() == 6
    assert bench.raw.ttl(bench.key("job", job_id)) == -1
    assert bench.raw.zscore(bench.key("gc"), job_id) is None
    leases = bench.claim(9, worker="w2")
    assert [(lease.index, lease.attempt, lease.solo) for lease in leases] == [
        (index, 1, False) for index in range(1, 7)
    ]
    bench.commit(*leases)
    assert bench.store.job(job_id, None).state == "succeeded"
    assert bench.store.job(job_id, None).progress == 1


def test_retrying_forgets_stalls(bench: Bench) -> None:
    job_id = bench.submit(1, max_stalls=0)
    bench.lose(bench.claim_one())
    bench.store.sweep()
    assert bench.states(job_id) == ["failed"]
    bench.store.retry(job_id, "ann")
    assert not bench.claim_one(worker="w2").solo


def test_retrying_while_others_run(bench: Bench) -> None:
    job_id = bench.submit(2)
    failed, running = bench.claim(2)
    bench.store.fail(failed, "bad", again=False)
    bench.store.retry(job_id, "ann")
    assert bench.states(job_id) == ["queued", "running"]
    assert bench.commit(running, failed) == [Commit.COMMITTED, Commit.STALE]


def test_retrying_nothing_is_a_conflict(bench: Bench) -> None:
    job_id = bench.submit(1)
    with pytest.raises(Conflict):
        bench.store.retry(job_id, "ann")


def test_retrying_is_safe_to_repeat(bench: Bench, monkeypatch) -> None:
    job_id = bench.submit(2)
    bench.store.cancel(job_id, "ann")
    run = bench.store._connection.run
    monkeypatch.setattr(bench.store._connection, "run", lambda *args: (run(*args), run(*args))[1])
    assert bench.store.retry(job_id, "ann").counts.queued == 2
    assert bench.quota() == 2


def test_the_worker_of_a_cancelled_and_retried_image_loses_it(bench: Bench) -> None:
    job_id = bench.submit(1)
    old = bench.claim_one()
    bench.store.cancel(job_id, "ann")
    bench.store.retry(job_id, "ann")
    assert bench.store.beat("w1", {(old.key, old.token): 4}, 60).lost == {old.key}
    assert bench.commit(old) == [Commit.STALE]
    assert bench.commit(bench.claim_one(worker="w2")) == [Commit.COMMITTED]


def test_a_retried_job_can_be_cancelled_and_retried_again(bench: Bench) -> None:
    job_id = bench.submit([request(steps=n) for n in range(1, 6)])
    bench.claim(2)
    bench.store.cancel(job_id, "ann")
    assert bench.store.retry(job_id, "ann").progress == 0
    bench.claim(3, worker="w2")
    assert bench.store.cancel(job_id, "ann").counts.cancelled == 5
    assert bench.store.retry(job_id, "ann").progress == 0
    assert bench.make_all() == 5
    assert bench.store.job(job_id, None).progress == 1


@pytest.mark.parametrize("move", ["cancel", "retry", "delete", "job"])
def test_others_jobs_do_not_exist(bench: Bench, move: str) -> None:
    job_id = bench.submit(1, tenant="ann")
    with pytest.raises(NotFound):
        getattr(bench.store, move)(job_id, "bob")
    with pytest.raises(NotFound):
        getattr(bench.store, move)("nonsense", "ann")
    assert bench.counts(job_id) == {"queued": 1}


def test_a_deleted_job_is_gone_at_once(bench: Bench) -> None:
    job_id = mixed(bench)
    other = bench.submit(1)
    bench.store.delete(job_id, "ann")
    for read in (lambda: bench.store.job(job_id, None), lambda: bench.store.images(job_id)):
        with pytest.raises(NotFound):
            read()
    assert [job.id for job in bench.store.jobs("ann")[0]] == [other]
    assert bench.quota() == 1
    assert not [name for name in bench.all_keys() if job_id in name]
    assert [lease.job_id for lease in bench.claim(9, worker="w2")] == [other]


def test_deleting_is_safe_to_repeat(bench: Bench, monkeypatch) -> None:
    job_id = bench.submit(1)
    run = bench.store._connection.run
    monkeypatch.setattr(bench.store._connection, "run", lambda *args: (run(*args), run(*args))[1])
    bench.store.delete(job_id, "ann")
    with pytest.raises(NotFound):
        bench.store.delete(job_id, "ann")


def test_files_of_a_deleted_job_that_never_ran_are_due_at_once(bench: Bench) -> None:
    job_id = bench.submit(1)
    bench.store.delete(job_id, "ann")
    assert bench.store.due(10) == [job_id]
    bench.store.forget(job_id)
    assert not bench.raw.exists(bench.key("gc"))


def test_files_that_were_not_removed_are_due_again_but_block_no_others(bench: Bench) -> None:
    jobs = [bench.submit(1, keep_seconds=0) for _ in range(3)]
    bench.make_all()
    assert sorted([*bench.store.due(2), *bench.store.due(2)]) == sorted(jobs)
    assert bench.store.due(2) == []
    bench.raw.zadd(bench.key("gc"), {jobs[1]: 1})
    assert bench.store.due(2) == [jobs[1]]


@pytest.mark.parametrize("before", ["nothing", "cancel", "commit"])
def test_files_of_a_deleted_job_that_ran_are_due_later(bench: Bench, before: str) -> None:
    """Its worker may be writing one, even after a cancel, when the job has no running images."""
    job_id = bench.submit(2)
    lease, _ = bench.claim(2)
    if before == "cancel":
        bench.store.cancel(job_id, "ann")
    elif before == "commit":
        bench.commit(lease)
    bench.store.delete(job_id, "ann")
    assert bench.store.due(10) == []
    assert bench.raw.zscore(bench.key("gc"), job_id) is not None


def test_an_expired_job_is_unreadable_once_its_files_are_due(bench: Bench) -> None:
    old, new = bench.submit(1, keep_seconds=0), bench.submit(1)
    bench.make_all()
    assert bench.store.job(old, "ann").state == "succeeded"
    assert bench.store.due(10) == [old]
    with pytest.raises(NotFound):
        bench.store.job(old, "ann")
    assert bench.raw.zrange(bench.key("jobs", "ann"), 0, -1) == [new]
    bench.store.forget(old)
    assert bench.store.due(10) == []


def test_a_readable_job_is_never_forgotten(bench: Bench) -> None:
    job_id = bench.submit(1)
    bench.make_all()
    bench.store.forget(job_id)
    assert bench.raw.zscore(bench.key("gc"), job_id) is not None
