"""Compares the store with a model of it in plain Python, through random moves.

The model has no order and no time: it takes from the claim which image was leased, and checks that
the image was ready. It predicts everything else (states, counts, quota, answers, depth).
"""

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jobs.errors import Conflict, QuotaExceeded
from jobs.job import Counts, Lease, Undelivered, job_state
from jobs.queue.store import Commit
from tests.jobs.bench import Bench, progress_made

QUOTA = 25
MAX_ATTEMPTS = 2
MAX_STALLS = 1


@dataclass(eq=False)
class Image:
    state: str = "queued"
    token: str | None = None
    attempts: int = 0
    stalls: int = 0
    is_delayed: bool = False


@dataclass
class ModelJob:
    tenant: str
    images: list[Image] = field(default_factory=list)


class StoreMachine(RuleBasedStateMachine):
    """`jobs` is the model; `leases` is every lease ever given."""

    bench: Bench

    def __init__(self) -> None:
        super().__init__()
        self.bench.clear()
        self.jobs: dict[str, ModelJob] = {}
        self.leases: list[Lease] = []

    def image(self, lease: Lease) -> Image | None:
        job = self.jobs.get(lease.job_id)
        return job.images[lease.index] if job else None

    def holds(self, lease: Lease) -> bool:
        image = self.image(lease)
        return image is not None and (image.state, image.token) == ("running", lease.token)

    def unfinished(self, tenant: str) -> int:
        return sum(
            image.state in ("queued", "running")
            for job in self.jobs.values()
            for image in job.images
            if job.tenant == tenant
        )

    @rule(tenant=st.sampled_from("ab"), images=st.integers(1, 8), priority=st.integers(4, 5))
    def submit(self, tenant: str, images: int, priority: int) -> None:
        options = {"tenant": tenant, "priority": priority, "quota": QUOTA}
        options |= {"max_attempts": MAX_ATTEMPTS, "max_stalls": MAX_STALLS}
        if self.unfinished(tenant) + images > QUOTA:
            with pytest.raises(QuotaExceeded):
                self.bench.submit(images, **options)
            return
        job_id = self.bench.submit(images, **options)
        self.jobs[job_id] = ModelJob(tenant, [Image() for _ in range(images)])

    @rule(worker=st.sampled_from(["w1", "w2"]), limit=st.integers(1, 5))
    def claim(self, worker: str, limit: int) -> None:
        held = [lease.key for lease in self.leases if self.holds(lease)]
        ready = [i for j in self.jobs.values() for i in j.images if i.state == "queued"]
        ready = [image for image in ready if not image.is_delayed]
        leases = self.bench.claim(limit, worker=worker, held=held)
        assert bool(leases) == bool(ready)
        for lease in leases:
            image = self.image(lease)
            assert image in ready
            image.state, image.token = "running", lease.token
            image.attempts += 1
            assert (lease.attempt, lease.solo) == (image.attempts, image.stalls > 0)
        assert len(leases) == 1 or not any(lease.solo for lease in leases)
        self.leases += leases

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        image = self.image(lease)
        expected = Commit.STALE
        if self.holds(lease):
            expected, image.state = Commit.COMMITTED, "succeeded"
        elif image and (image.state, image.token) == ("succeeded", lease.token):
            expected = Commit.ALREADY_YOURS
        assert self.bench.commit(lease) == [expected]

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), again=st.booleans(), delay=st.sampled_from([0, 600]))
    def fail(self, data: st.DataObject, again: bool, delay: int) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        held, image = self.holds(lease), self.image(lease)
        is_accepted = self.bench.store.fail(lease, "no", again=again, delay_seconds=delay)
        if held:
            assert is_accepted
            again = again and image.attempts < MAX_ATTEMPTS
            image.state = "queued" if again else "failed"
            image.is_delayed = again and delay > 0

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        held = self.holds(lease)
        assert self.bench.store.release([lease]) == held
        if held:
            image = self.image(lease)
            image.state, image.attempts = "queued", image.attempts - 1

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def stall(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        held = self.holds(lease)
        if held:
            self.bench.lose(lease)
            image = self.image(lease)
            image.stalls, image.attempts = image.stalls + 1, image.attempts - 1
            image.state = "queued" if image.stalls <= MAX_STALLS else "failed"
        assert self.bench.store.sweep() == held

    @rule(step=st.integers(0, 8))
    def beat(self, step: int) -> None:
        steps = {(lease.key, lease.token): step for lease in self.leases}
        beat = self.bench.store.beat("w", steps, 60)
        states = {"lost": set(), "cancelled": set()}
        for lease in self.leases:
            image = self.image(lease)
            if not self.holds(lease):
                is_cancelled = image and (image.state, image.token) == ("cancelled", lease.token)
                states["cancelled" if is_cancelled else "lost"].add(lease.key)
        assert (beat.lost, beat.cancelled) == (states["lost"], states["cancelled"])

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        self.bench.store.cancel(job_id, None)
        for image in self.jobs[job_id].images:
            if image.state in ("queued", "running"):
                if image.state == "queued" and image.token is None:
                    image.attempts = 0
                image.state, image.is_delayed = "cancelled", False

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        job = self.jobs[job_id]
        ended = [
            index
            for index, image in enumerate(job.images)
            if image.state in ("failed", "cancelled")
        ]
        if not ended:
            with pytest.raises(Conflict):
                self.bench.store.retry(job_id, None)
            return
        self.bench.store.retry(job_id, None)
        for index in ended:
            job.images[index] = Image()

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        self.bench.store.delete(job_id, None)
        del self.jobs[job_id]

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), is_delivered=st.booleans())
    def attempt_webhook(self, data: st.DataObject, is_delivered: bool) -> None:
        """Changes nothing but what the job shows of its messages."""
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        message = Undelivered("msg_1", "job.failed", 1, 2.5, "no", None)
        if is_delivered:
            self.bench.store.delivered(job_id, message.id)
        else:
            self.bench.store.undelivered(job_id, message)
        shown = () if is_delivered else (message,)
        assert self.bench.store.job(job_id, None).undelivered == shown

    @rule()
    def flush_scripts(self) -> None:
        self.bench.raw.script_flush()

    @invariant()
    def jobs_are_as_predicted(self) -> None:
        for job_id, model in self.jobs.items():
            counted = Counter(image.state for image in model.images)
            names = ("queued", "running", "succeeded", "failed", "cancelled")
            expected = Counts(len(model.images), *(counted[name] for name in names))
            job, images = self.bench.store.job(job_id, None), self.bench.store.images(job_id)
            assert (job.counts, job.state) == (expected, job_state(expected))
            assert 0 <= job.progress <= 1
            if job.state.finished:
                assert job.progress == progress_made(images)
            assert (job.expires is not None) == job.state.finished
            assert [(i.state, i.attempts) for i in images] == [
                (i.state, i.attempts) for i in model.images
            ]

    @invariant()
    def keys_are_as_predicted(self) -> None:
        images = [image for job in self.jobs.values() for image in job.images]
        running = sum(image.state == "running" for image in images)
        ready = sum(image.state == "queued" and not image.is_delayed for image in images)
        raw, key = self.bench.raw, self.bench.key
        assert raw.zcard(key("leases")) == running
        assert sum(self.bench.store.queue_depth().get("demo", {}).values()) == ready
        assert {t: int(n) for t, n in raw.hgetall(key("quota")).items()} == {
            tenant: self.unfinished(tenant) for tenant in "ab" if self.unfinished(tenant)
        }
        kinds = {name.partition(":")[0] for name in self.bench.all_keys()}
        assert ready or not kinds & {"ready", "fair", "idle", "load", "depth", "times"}


def test_random_moves(bench: Bench) -> None:
    machine = type("Machine", (StoreMachine,), {"bench": bench})
    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=40))
