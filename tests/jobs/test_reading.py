"""Listing, workers, cards and events."""

from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest

from jobs.errors import InvalidRequest, NotFound
from jobs.job import State
from jobs.queue import reader
from jobs.queue.store import Store, WorkerInfo
from jobs.reports import ModelCard, WorkerReport
from tests.jobs.bench import Bench, request
from tests.waiting import LONG_PATIENCE, PATIENCE, wait_until


def test_jobs_come_newest_first_and_page_by_page(bench: Bench) -> None:
    jobs = [bench.submit(1) for _ in range(7)][::-1]
    bench.submit(1, tenant="bob")
    listed, cursor = [], None
    for size in (3, 3, 1):
        page, cursor = bench.store.jobs("ann", cursor=cursor, limit=3)
        assert len(page) == size
        listed += [job.id for job in page]
    assert (listed, cursor) == (jobs, None)
    assert bench.store.jobs("nobody") == ([], None)


def test_the_last_page_has_no_cursor(bench: Bench) -> None:
    bench.submit(1)
    bench.submit(1)
    page, cursor = bench.store.jobs("ann", limit=2)
    assert len(page) == 2
    assert cursor is None


def test_jobs_by_state_over_many_pages(bench: Bench) -> None:
    done = [bench.submit(1, priority=9)]
    bench.make_all()
    for _ in range(210):
        bench.submit(1)
    page, cursor = bench.store.jobs("ann", state=State.SUCCEEDED, limit=1)
    assert ([job.id for job in page], cursor) == (done, None)


def test_a_rare_state_is_searched_in_several_calls(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_MOST_READ", 3)
    done = [bench.submit(1, priority=9)]
    bench.make_all()
    for _ in range(5):
        bench.submit(1)
    first, cursor = bench.store.jobs("ann", state=State.SUCCEEDED)
    second, end = bench.store.jobs("ann", state=State.SUCCEEDED, cursor=cursor)
    assert (first, [job.id for job in second], end) == ([], done, None)


@pytest.mark.parametrize("cursor", ["(evil", "", "٣", "1\n2", "-1"])
def test_an_invalid_cursor_is_refused(bench: Bench, cursor: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        bench.store.jobs("ann", cursor=cursor)
    assert caught.value.problems[0].pointer == "/cursor"


def test_slices_of_images(bench: Bench) -> None:
    job_id = bench.submit([request(seed=seed) for seed in range(600)])
    bench.commit(*bench.claim(3))
    bench.store.cancel(job_id, "ann")
    for start, stop in ((0, -1), (1, 3), (-2, -1), (2, 500), (598, 9999), (700, 800)):
        images = bench.store.images(job_id, start, stop)
        last = stop if stop >= 0 else 600 + stop
        indices = list(range(600))[start : last + 1]
        assert [image.index for image in images] == indices
        assert [image.request.seed for image in images] == indices
        assert [image.state for image in images] == [
            "succeeded" if index < 3 else "cancelled" for index in indices
        ]


@pytest.mark.parametrize("index", [-1, 2])
def test_missing_images_are_not_found(bench: Bench, index: int) -> None:
    job_id = bench.submit(2)
    with pytest.raises(NotFound):
        bench.store.image(job_id, index)


def test_missing_jobs_are_not_found(bench: Bench) -> None:
    for read in (bench.store.images, bench.store.spec):
        with pytest.raises(NotFound):
            read("nonsense")


def test_depth_counts_ready_images(bench: Bench) -> None:
    bench.submit(3, priority=2)
    bench.submit(2, priority=9)
    bench.submit([request(model="other.model-2")])
    assert bench.store.queue_depth() == {"demo": {2: 3, 9: 2}, "other.model-2": {5: 1}}
    bench.store.fail(bench.claim_one(), "busy", again=True, delay_seconds=600)
    assert bench.store.queue_depth()["demo"] == {2: 3, 9: 1}


def test_workers_are_listed_while_they_register(bench: Bench) -> None:
    assert bench.store.workers() == []
    bench.store.register("w2", WorkerReport("demo", "ready"), 60)
    bench.store.register("w1", WorkerReport("demo", "starting"), 60)
    assert bench.store.workers() == [
        WorkerInfo("w1", WorkerReport("demo", "starting")),
        WorkerInfo("w2", WorkerReport("demo", "ready")),
    ]
    bench.store.unregister("w2")
    bench.store.register("w1", WorkerReport("demo", "ready"), 0.05)
    wait_until(lambda: bench.store.workers() == [])
    bench.store.register("w3", WorkerReport(), 60)
    assert bench.raw.zrange(bench.key("workers"), 0, -1) == ["w3"]


def test_a_published_card_can_be_read(bench: Bench) -> None:
    assert bench.store.card("demo") is None
    bench.store.publish_card("demo", ModelCard("somewhere", {"steps": 4}))
    assert bench.store.card("demo") == ModelCard("somewhere", {"steps": 4})


def test_a_jobs_life_in_events(bench: Bench) -> None:
    after = bench.store.last_event()
    job_id = bench.submit(2, max_attempts=1)
    first, second = bench.claim(2)
    bench.commit(first)
    bench.store.fail(second, "too dark", again=True)
    bench.store.retry(job_id, "ann")
    bench.store.cancel(job_id, "ann")
    bench.store.delete(job_id, "ann")
    events = bench.store.events(after, 0)
    assert [(event.type, event.index) for event in events] == [
        ("queued", None),
        ("running", None),
        ("image", 0),
        ("image_failed", 1),
        ("failed", None),
        ("running", None),
        ("cancelled", None),
        ("deleted", None),
    ]
    assert {event.job_id for event in events} == {job_id}
    assert events[3].data == {"error": "too dark"}
    assert bench.store.events(events[-2].id, 0) == events[-1:]
    assert bench.store.events(bench.store.last_event(), 0) == []


def test_progress_events_come_at_most_every_250_ms(bench: Bench) -> None:
    job_id = bench.submit([request(steps=10**6)])
    lease = bench.claim_one()
    steps = count(1)

    def milliseconds() -> int:
        seconds, micro = bench.raw.time()
        return int(seconds * 1000 + micro // 1000)

    def burst() -> bool:
        """Whether several beats took less than 200 ms; if so, they must have caused no event."""
        after, began = bench.store.last_event(), milliseconds()
        bench.raw.hset(bench.key("job", job_id), "told", began)
        for _ in range(7):
            bench.store.beat("w1", {(lease.key, lease.token): next(steps)}, 60)
        is_quick = milliseconds() - began < 200
        assert not is_quick or bench.store.events(after, 0) == []
        return is_quick

    wait_until(burst)
    after = bench.store.last_event()
    bench.raw.hincrby(bench.key("job", job_id), "told", -250)
    bench.store.beat("w1", {(lease.key, lease.token): next(steps)}, 60)
    assert [event.type for event in bench.store.events(after, 0)] == ["progress"]


def test_reading_events_waits_for_one(bench: Bench, patient: Store) -> None:
    after = bench.store.last_event()
    assert bench.store.events(after, 0.01) == []
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(patient.events, after, LONG_PATIENCE)
        wait_until(lambda: bench.raw.info("clients")["blocked_clients"])
        job_id = bench.submit(1)
        assert [event.job_id for event in reading.result(PATIENCE)] == [job_id]
