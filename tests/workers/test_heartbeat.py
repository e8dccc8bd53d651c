"""The heartbeat over a real queue: what it keeps alive, drops and reports."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from jobs.errors import StorageUnavailable
from jobs.job import Lease, State
from jobs.queue.store import Beat, Store
from jobs.reports import WorkerReport
from jobs.runtime.embedded_queue import EmbeddedServer
from pipelines.fake import FakePipeline
from tests.jobs.bench import Bench
from tests.waiting import PATIENCE, wait_until
from tests.workers.conftest import request
from workers import heartbeat
from workers.heartbeat import Heartbeat, worker_name
from workers.in_flight import InFlight, InFlightImages
from workers.settings import WorkerSettings

LEASE_SECONDS = 3600.0
STEPS = 4


class Held:
    """The heartbeat of a worker `w1` that holds a job's images, and counts of its callbacks."""

    def __init__(self, bench: Bench, images: int) -> None:
        self.bench, self.flights = bench, InFlightImages()
        self.job_id = bench.submit([request(steps=STEPS) for _ in range(images)])
        for lease in bench.claim(images, worker="w1", model="fake", lease_seconds=LEASE_SECONDS):
            self.flights.add(InFlight(lease))
        self.beats = self.rebalances = 0
        self.is_stuck = False
        self.heartbeat = Heartbeat(
            name="w1",
            store=bench.store,
            settings=WorkerSettings(lease_seconds=LEASE_SECONDS),
            flights=self.flights,
            describe=self._describe,
            stuck=lambda: self.is_stuck,
            rebalance=self._rebalance,
        )

    def _describe(self) -> WorkerReport:
        self.beats += 1
        return WorkerReport("fake", steps=self.beats)

    def _rebalance(self) -> None:
        self.rebalances += 1

    @contextmanager
    def beating(self) -> Iterator[threading.Thread]:
        """Run the heartbeat on its own thread."""
        thread = threading.Thread(target=self.heartbeat.run)
        thread.start()
        try:
            yield thread
        finally:
            self.heartbeat.stop()
            thread.join(PATIENCE)
        assert not thread.is_alive()

    def beat(self, times: int = 2) -> None:
        """Wait for this many complete beats that start after now."""
        enough = self.rebalances + times
        wait_until(lambda: self.rebalances >= enough)

    def deadline(self, lease: Lease) -> float:
        """When the lease expires, in ms."""
        return float(self.bench.raw.zscore(self.bench.key("leases"), lease.key) or 0)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A queue whose workers beat and sweep without pauses."""
    monkeypatch.setattr(heartbeat, "SLOWEST_BEAT", 0.001)
    monkeypatch.setattr(heartbeat, "SWEEP_SECONDS", 0.0)
    monkeypatch.setattr(heartbeat, "REGISTERED_SECONDS", LEASE_SECONDS)
    with EmbeddedServer.ensure(tmp_path / "queue") as server:
        store = Store.connect(server.url)
        with redis.Redis.from_url(server.url, decode_responses=True, protocol=2) as raw:
            yield Bench(store, raw, "default")
        store.close()


def begin(flight: InFlight) -> None:
    """Give the image a sample that has made a step."""
    pipeline = FakePipeline()
    [flight.conditioning] = pipeline.encode([flight.lease.request])
    flight.sample = pipeline.start(flight.lease.request, flight.conditioning)
    pipeline.step([flight.sample])


def test_all_leases_are_extended(bench: Bench) -> None:
    held = Held(bench, 2)
    first, second = held.flights.all()
    begin(first)
    before = {flight: held.deadline(flight.lease) for flight in (first, second)}
    with held.beating():
        wait_until(lambda: all(held.deadline(f.lease) > before[f] for f in before))
    assert not first.dropped and not second.dropped


def test_steps_are_reported(bench: Bench) -> None:
    held = Held(bench, 2)
    first, _ = held.flights.all()
    begin(first)
    with held.beating():
        wait_until(lambda: [image.step for image in bench.store.images(held.job_id)] == [1, 0])
        assert first.sample is not None
        FakePipeline().step([first.sample])
        wait_until(lambda: [image.step for image in bench.store.images(held.job_id)] == [2, 0])


def test_cancelled_image_and_sample_are_dropped(bench: Bench) -> None:
    held = Held(bench, 1)
    [flight] = held.flights.all()
    begin(flight)
    with held.beating():
        held.beat()
        assert not flight.dropped
        bench.store.cancel(held.job_id, None)
        wait_until(lambda: flight.dropped)
    assert flight.sample is not None
    assert flight.sample.cancelled


def test_image_with_a_lost_lease_is_dropped(bench: Bench) -> None:
    held = Held(bench, 2)
    lost, other = held.flights.all()
    bench.store.release([lost.lease])
    [claimed] = bench.claim(1, worker="w2", model="fake")
    with held.beating():
        wait_until(lambda: lost.dropped)
        held.beat()
    assert not other.dropped
    leases = {(claimed.key, claimed.token): 0}
    assert bench.store.beat("w2", leases, LEASE_SECONDS).lost == frozenset()


def test_image_delivered_during_the_beat_is_not_dropped(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue reports its lease as lost, but it ended with the commit."""
    held = Held(bench, 1)
    [flight] = held.flights.all()
    beat = bench.store.beat

    def deliver_and_beat(
        worker: str, leases: Mapping[tuple[str, str], int], lease_seconds: float
    ) -> Beat:
        if held.flights.all():
            bench.commit(flight.lease)
            held.flights.remove(flight)
        return beat(worker, leases, lease_seconds)

    monkeypatch.setattr(bench.store, "beat", deliver_and_beat)
    with held.beating():
        held.beat()
    assert held.flights.all() == []
    assert not flight.dropped


def test_preview_requests_arrive(bench: Bench) -> None:
    held = Held(bench, 2)
    first, second = held.flights.all()
    with held.beating():
        bench.store.want_preview(held.job_id, second.lease.index)
        wait_until(lambda: second.wished)
    assert not first.wished


def test_own_leases_are_extended_before_sweeping(bench: Bench) -> None:
    """After a suspended machine wakes, all leases have expired, but live workers keep theirs."""
    held = Held(bench, 1)
    other = bench.submit([request()])
    [lost] = bench.claim(1, worker="dead", model="fake")
    bench.store.sweep()
    bench.lose(lost, *(flight.lease for flight in held.flights.all()))
    with held.beating():
        wait_until(lambda: bench.states(other) == [State.QUEUED])
    assert bench.states(held.job_id) == [State.RUNNING]
    assert not any(flight.dropped for flight in held.flights.all())


def test_worker_stays_registered_while_it_beats(bench: Bench) -> None:
    held = Held(bench, 1)
    with held.beating():
        wait_until(lambda: len(bench.store.workers()) == 1)
        [worker] = bench.store.workers()
        assert worker.id == "w1"
        wait_until(lambda: bench.store.workers()[0].report != worker.report)
    left = bench.raw.pttl(bench.key("worker", "w1"))
    assert 0 < left <= heartbeat.REGISTERED_SECONDS * 1000


def test_idle_worker_beats_and_sweeps(bench: Bench) -> None:
    held = Held(bench, 1)
    [flight] = held.flights.all()
    held.flights.remove(flight)
    bench.store.sweep()
    bench.lose(flight.lease)
    with held.beating():
        wait_until(lambda: bench.states(held.job_id) == [State.QUEUED])
        held.beat()


def test_heartbeat_survives_a_queue_outage(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(bench, 1)
    [flight] = held.flights.all()
    away, refused, beat = threading.Event(), threading.Event(), bench.store.beat

    def beat_or_refuse(
        worker: str, leases: Mapping[tuple[str, str], int], lease_seconds: float
    ) -> Beat:
        if away.is_set():
            refused.set()
            raise StorageUnavailable("away")
        return beat(worker, leases, lease_seconds)

    monkeypatch.setattr(bench.store, "beat", beat_or_refuse)
    with held.beating():
        away.set()
        assert refused.wait(PATIENCE)
        away.clear()
        before = held.deadline(flight.lease)
        wait_until(lambda: held.deadline(flight.lease) > before)
    assert not flight.dropped


def test_stuck_worker_exits(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        held.heartbeat.stop()
        raise StorageUnavailable("gone")

    monkeypatch.setattr("workers.heartbeat.os._exit", leave)
    held = Held(bench, 1)
    held.is_stuck = True
    with pytest.raises(StorageUnavailable):
        held.heartbeat.run()
    assert codes == [70]
    assert held.beats == 0


def test_worker_names_are_unique() -> None:
    """Host and process id aren't enough: a restarted container may have the same ones."""
    names = {worker_name("demo", 0) for _ in range(100)}
    assert len(names) == 100
