"""The ETA of a job, as tables of cases."""

from dataclasses import replace

import pytest

from jobs.job import Counts, ImageView, Job, State
from jobs.queue.decode import Ahead, WorkerInfo
from jobs.reports import WorkerReport
from jobs.request import ImageRequest
from service.read.eta import Speed, Work, eta_seconds, speed, work_of_counts, work_of_images

REQUEST = ImageRequest("demo", "a", 1, 10, 10, 8, 1.0)
"""800 pixel-steps."""
WAITING = ImageView(0, REQUEST, State.QUEUED, 0, 0, None, None)
HALF = replace(WAITING, state=State.RUNNING, step=4, attempts=1)
DONE = replace(WAITING, state=State.SUCCEEDED, step=8)


@pytest.mark.parametrize(
    ("images", "ahead", "speed", "expected"),
    [
        ([800], Ahead(0, 0), Speed(400), 2.0),
        ([800], None, Speed(400), 2.0),
        ([800], Ahead(10, 10, 8000), Speed(400), 22.0),
        ([800], Ahead(10, 10, 800), Speed(400), 4.0),
        ([800, 800], Ahead(0, 1), Speed(400), 4.0),
        ([800, 800], Ahead(0, 1), Speed(800, slots=2), 2.0),
        # the third image runs alone, and takes as long as the first two together
        ([800] * 3, None, Speed(800, slots=2), 4.0),
        ([400, 800, 800], None, Speed(800, slots=2), 3.0),
        # the shortest of the look-ahead goes first, so the long one is last
        ([800, *[100] * 7], None, Speed(200, slots=2), 11.0),
        ([100, 800, 100], None, Speed(100), 10.0),
        ([*[100] * 7, 800], None, Speed(200, slots=2), 11.0),
        ([800], None, Speed(400, held=1600), 6.0),
        ([], None, Speed(400), 0.0),
        ([], None, Speed(), 0.0),
        ([800], Ahead(0, 0), Speed(), None),
    ],
)
def test_eta(images: list[float], ahead: Ahead | None, speed: Speed, expected: object) -> None:
    assert eta_seconds(Work(images), ahead, speed) == expected


def test_held_images_of_the_job_are_not_counted_twice() -> None:
    work = Work([400, 800], running=400)
    assert eta_seconds(work, None, Speed(400, held=400)) == 3.0
    assert eta_seconds(work, None, Speed(400, held=1200)) == 5.0


def test_work_of_images() -> None:
    assert work_of_images([DONE, WAITING, replace(HALF, index=2)]) == Work([400.0, 800.0], 400.0)
    assert work_of_images([DONE]) == Work([])


@pytest.mark.parametrize(
    ("counts", "progress", "expected"),
    [
        (Counts(4, 4, 0, 0, 0, 0), 0.0, Work([800.0] * 4, 0.0)),
        (Counts(4, 2, 1, 1, 0, 0), 0.375, Work([400.0, 800.0, 800.0], 400.0)),
        (Counts(4, 0, 0, 3, 1, 0), 1.0, Work(())),
    ],
)
def test_work_of_counts(counts: Counts, progress: float, expected: Work) -> None:
    state = State.SUCCEEDED if counts.finished == counts.total else State.RUNNING
    job = Job(
        "j", "t", "demo", 5, state, counts, progress, 0, None, None, None, "1", steps=32, cost=800
    )
    assert work_of_counts(job) == expected


def test_only_ready_workers_of_the_model_count() -> None:
    known = WorkerReport(
        "demo",
        "ready",
        pixel_steps_per_second=200,
        samples_per_forward=4,
        held_pixel_steps=10,
    )
    reports = [
        known,
        replace(known, samples_per_forward=0.5),
        WorkerReport("demo", "ready", held_pixel_steps=5),
        WorkerReport("demo", "ready"),
        replace(known, state="starting"),
        replace(known, model="other"),
    ]
    workers = [WorkerInfo(str(number), report) for number, report in enumerate(reports)]
    assert speed(workers, "demo") == Speed(rate=400, slots=5, held=25)
    assert speed([], "demo") == Speed(slots=0)
