"""What a draining worker keeps, and what it gives back at once."""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from jobs.job import Lease
from jobs.queue.store import Store
from jobs.request import ImageRequest
from jobs.runtime.embedded_queue import EmbeddedServer
from pipelines.fake import FakePipeline
from pipelines.seam import Conditioning, Sample
from tests.waiting import PATIENCE, wait_until
from tests.workers.conftest import request
from tests.workers.line import Line
from workers.scheduler import BUCKETS, Costs

NO_BATCH_PAYS = Costs(tuple((2 * 16 * b, 0.002 * b) for b in BUCKETS))
LONG = 100_000
"""More steps than finish during a test."""


class Gated(FakePipeline):
    """A fake whose `verb` waits at a gate; `at_gate` is set once all slots wait there."""

    def __init__(self, verb: str, *, in_flight: int = 1, phased: bool = False) -> None:
        super().__init__(seconds_per_step=0.002, in_flight=in_flight, phased=phased)
        self.at_gate, self.gate = threading.Event(), threading.Event()
        self._verb = verb
        self._missing = threading.Barrier(in_flight, self.at_gate.set)

    def encode(self, requests: Sequence[ImageRequest]) -> list[Conditioning]:
        self._come_to("encode")
        return super().encode(requests)

    def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
        self._come_to("step")
        super().step(samples, bucket)

    def _come_to(self, verb: str) -> None:
        if verb == self._verb and not self.gate.is_set():
            self._missing.wait(PATIENCE)
            assert self.gate.wait(PATIENCE)


MakeLine = Callable[[Gated], Line[Gated]]


@pytest.fixture
def line_of(tmp_path: Path) -> Iterator[MakeLine]:
    """Makes lines; drops what they still hold afterwards, and stops them."""
    lines: list[Line[Gated]] = []

    def make(pipeline: Gated) -> Line[Gated]:
        lines.append(Line(tmp_path, store, pipeline, NO_BATCH_PAYS))
        return lines[-1]

    with EmbeddedServer.ensure(tmp_path / "queue") as server:
        store = Store.connect(server.url)
        yield make
        for line in lines:
            line.pipeline.gate.set()
            for flight in line.flights.all():
                flight.drop()
            line.drain()
        store.close()


def stop(line: Line[Gated]) -> None:
    """Stop intake and engine, as SIGTERM does."""
    line.intake.stopping.set()
    line.engine.stopping.set()


def images(count: int, **changes: object) -> list[ImageRequest]:
    return [request(seed=seed, **changes) for seed in range(count)]


@pytest.mark.parametrize(("in_flight", "phased"), [(1, False), (2, False), (1, True)])
def test_drain_gives_back_unstarted_images(line_of: MakeLine, in_flight: int, phased: bool) -> None:
    line = line_of(Gated("nothing", in_flight=in_flight, phased=phased))
    line.submit(*images(in_flight + 2, steps=LONG))
    line.start()
    wait_until(lambda: line.engine.unstarted == 2 and any(f.step for f in line.flights.all()))
    stop(line)
    wait_until(lambda: line.job().counts.queued == 2)
    attempts = [image.attempts for image in line.store.images(line.job_ids[0])]
    assert attempts == [1] * in_flight + [0, 0]
    running = wait_until(lambda: len(held := line.flights.all()) == in_flight and held)
    before = {flight: flight.step for flight in running}
    wait_until(lambda: all(flight.step > before[flight] for flight in running))


def test_drain_keeps_images_in_a_running_pass(line_of: MakeLine) -> None:
    line = line_of(Gated("step", in_flight=2))
    line.submit(*images(3))
    line.start()
    assert line.pipeline.at_gate.wait(PATIENCE)
    stop(line)
    wait_until(lambda: line.job().counts.queued == 1)
    line.pipeline.gate.set()
    line.drain()
    assert (line.job().counts.succeeded, line.job().counts.queued) == (2, 1)


def test_drain_gives_back_encoded_images_during_a_long_pass(line_of: MakeLine) -> None:
    line = line_of(Gated("step"))
    line.submit(request())
    line.start()
    assert line.pipeline.at_gate.wait(PATIENCE)
    line.submit(*images(2))
    wait_until(lambda: line.intake.ready.qsize() == 2)
    stop(line)
    wait_until(lambda: line.job().counts.queued == 2)
    assert line.job(0).counts.running == 1


@pytest.mark.parametrize("phased", [False, True])
def test_drain_gives_back_images_waiting_for_encoding(line_of: MakeLine, phased: bool) -> None:
    line = line_of(Gated("encode", phased=phased))
    line.submit(*images(3))
    line.start()
    assert line.pipeline.at_gate.wait(PATIENCE)
    wait_until(lambda: len(line.flights) == 3)
    stop(line)
    line.pipeline.gate.set()
    wait_until(lambda: line.job().counts.queued == 3)
    assert line.pipeline.calls == []


@pytest.mark.parametrize("phased", [False, True])
def test_drain_gives_back_waiting_solo_image(line_of: MakeLine, phased: bool) -> None:
    line = line_of(Gated("step", phased=phased))
    line.submit(request())
    line.store.claim("fake", "dead", limit=1, lease_seconds=0.001, nonce="n")
    wait_until(line.store.sweep)
    line.submit(request(), priority=9)
    line.start()
    assert line.pipeline.at_gate.wait(PATIENCE)
    wait_until(lambda: len(line.flights) == 2)
    stop(line)
    wait_until(lambda: line.job(0).counts.queued == 1)
    assert line.job(1).counts.running == 1


def test_nothing_is_claimed_while_draining(
    line_of: MakeLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the intake is just about to claim."""

    def stop_late() -> int:
        stop(line)
        return 4

    claims: list[object] = []

    def claim(*_: object, **__: object) -> list[Lease]:
        claims.append(1)
        return []

    line = line_of(Gated("nothing"))
    line.submit(request())
    monkeypatch.setattr(line.store, "claim", claim)
    monkeypatch.setattr(line.engine, "capacity", stop_late)
    line.intake.run()
    line.start()
    assert not claims


@pytest.mark.parametrize("phased", [False, True])
def test_image_cancelled_before_encoding_takes_no_room(line_of: MakeLine, phased: bool) -> None:
    line = line_of(Gated("encode", phased=phased))
    line.submit(request())
    line.submit(request())
    line.start()
    assert line.pipeline.at_gate.wait(PATIENCE)
    wait_until(lambda: len(line.flights) == 2)
    line.store.cancel(line.job_ids[1], None)
    line.flights.all()[1].drop()
    line.pipeline.gate.set()
    wait_until(lambda: len(line.flights) == 0)
    assert line.job(0).counts.succeeded == 1
