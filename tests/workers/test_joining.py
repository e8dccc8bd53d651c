"""A full worker still admits other jobs, and makes the previews that are requested."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.queue.store import Store
from jobs.runtime.embedded_queue import EmbeddedServer
from pipelines.fake import FakePipeline
from pipelines.seam import Sample
from tests.waiting import wait_until
from tests.workers.conftest import BATCHES_PAY, request
from tests.workers.line import Line
from workers.scheduler import BUCKETS, Costs

NO_BATCH_PAYS = Costs(tuple((2 * 16 * b, 0.002 * b) for b in BUCKETS))
LONG, SHORT = 100_000, 3
"""Steps; long images don't finish during a test."""


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line[FakePipeline]]:
    """A running line; drops what it still holds afterwards, and stops it."""
    with EmbeddedServer.ensure(tmp_path / "queue") as server:
        store = Store.connect(server.url)
        line = Line(tmp_path, store, FakePipeline(seconds_per_step=0.002), NO_BATCH_PAYS)
        line.start()
        yield line
        for flight in line.flights.all():
            flight.drop()
        line.drain()
        store.close()


def hold_up(line: Line[FakePipeline]) -> None:
    """Fill the worker with very long images, and queue as many again."""
    capacity = line.engine.capacity()
    line.submit(*(request(seed=n, steps=LONG) for n in range(2 * capacity)))
    wait_until(lambda: len(line.flights) == capacity)


@pytest.mark.parametrize(("tenant", "priority"), [("another", 5), ("t", 5), ("t", 9)])
def test_long_images_do_not_hold_up_a_short_job(
    line: Line[FakePipeline], tenant: str, priority: int
) -> None:
    """Whether of another caller, the same one, or a higher priority."""
    hold_up(line)
    short = [request(seed=n, steps=SHORT) for n in range(4)]
    line.submit(*short, tenant=tenant, priority=priority)
    assert line.finished().counts.succeeded == 4
    assert line.job(0).counts.finished == 0


def test_joining_respects_priority_and_a_limit(line: Line[FakePipeline]) -> None:
    hold_up(line)
    capacity = line.engine.capacity()
    line.submit(request(steps=SHORT), priority=4)
    for number in range(2 * capacity):
        line.submit(request(seed=number, steps=LONG), tenant=f"tenant {number}")
    wait_until(lambda: len(line.flights) == 2 * capacity)
    assert line.job(1).counts.queued == 1


def test_every_requested_preview_is_made(line: Line[FakePipeline], tmp_path: Path) -> None:
    """For all images that run together, not just the first."""
    line.engine._measured = BATCHES_PAY
    line.submit(*(request(seed=n, steps=LONG) for n in range(6)))
    wait_until(lambda: all(f.step for f in line.flights.all()) and len(line.flights) == 6)
    for flight in line.flights.all():
        flight.wished = True
    previews = tmp_path / "images"
    wait_until(lambda: len(list(previews.rglob("*preview*"))) == 6)


def test_failed_preview_does_not_fail_the_image(
    line: Line[FakePipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def preview(sample: Sample) -> None:
        asked.append(sample.step)
        raise IndexError("beyond its end")

    monkeypatch.setattr(line.pipeline, "preview", preview)
    line.submit(request(steps=LONG))
    flight = wait_until(lambda: next((f for f in line.flights.all() if f.step), None))
    flight.wished = True
    wait_until(lambda: asked)
    wait_until(lambda: flight.step > asked[0] + 1)
    assert line.job().counts.running == 1
