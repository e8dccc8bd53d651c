"""When a job will be done: a table."""

from dataclasses import replace

import pytest

from jobs.job import ImageView, State
from jobs.request import ImageRequest
from jobs.views import Ahead, WorkerInfo
from service.eta import eta_seconds, steps_per_second, work_of_images

REQUEST = ImageRequest("demo", "a", 1, 64, 64, 8, 1.0)
WAITING = ImageView(0, REQUEST, State.QUEUED, 0, 0, None, None)
HALF = replace(WAITING, state=State.RUNNING, step=4)
DONE = replace(WAITING, state=State.SUCCEEDED, step=8)


@pytest.mark.parametrize(
    ("images", "ahead", "rate", "expected"),
    [
        ([WAITING], Ahead(0, 0), 4, 2.0),
        ([WAITING], None, 4, 2.0),
        ([WAITING], Ahead(10, 10), 4, 22.0),
        ([WAITING, WAITING], Ahead(0, 1), 4, 4.0),
        ([WAITING, WAITING], Ahead(3, 7), 4, 16.0),
        ([HALF, WAITING, DONE], Ahead(0, 0), 4, 3.0),
        ([DONE], None, 4, 0.0),
        ([DONE], None, 0, 0.0),
        ([WAITING], Ahead(0, 0), 0, None),
    ],
)
def test_eta(images: list[ImageView], ahead: Ahead | None, rate: float, expected: object) -> None:
    assert eta_seconds(work_of_images(images), ahead, rate) == expected


def test_only_ready_workers_of_the_model_count() -> None:
    infos = [
        {"model": "demo", "state": "ready", "steps_per_second": 2},
        {"model": "demo", "state": "ready", "steps_per_second": 1.5},
        {"model": "demo", "state": "ready"},
        {"model": "demo", "state": "starting", "steps_per_second": 2},
        {"model": "other", "state": "ready", "steps_per_second": 2},
    ]
    workers = [WorkerInfo(str(number), info) for number, info in enumerate(infos)]
    assert steps_per_second(workers, "demo") == 3.5
