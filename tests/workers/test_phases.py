"""A phased pipeline: the worker's threads over a real queue and a fake model."""

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from jobs.queue.store import Store
from jobs.request import ImageRequest
from jobs.runtime.embedded_queue import EmbeddedServer
from pipelines.fake import FakePipeline
from pipelines.seam import Conditioning, Sample
from tests.waiting import PATIENCE, wait_until
from tests.workers.conftest import BATCHES_PAY, request
from tests.workers.line import Line
from workers import engine
from workers.phases import Phase, Phases

T = TypeVar("T")


class Staged(FakePipeline):
    """A phased fake that logs each verb with its seeds, and fails if two run at once."""

    def __init__(self) -> None:
        super().__init__(phased=True)
        self.log: list[tuple[str, list[int]]] = []
        self.before_step: Callable[[], None] = lambda: None
        self._alone = threading.Lock()

    def encode(self, requests: Sequence[ImageRequest]) -> list[Conditioning]:
        return self._logged("encode", requests, lambda: super(Staged, self).encode(requests))

    def step(self, samples: Sequence[Sample], bucket: int = 0) -> None:
        self.before_step()
        requests = [sample.request for sample in samples]
        self._logged("step", requests, lambda: super(Staged, self).step(samples, bucket))

    def decode(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        requests = [sample.request for sample in samples]
        return self._logged("decode", requests, lambda: super(Staged, self).decode(samples))

    def preview(self, sample: Sample) -> torch.Tensor | None:
        raise AssertionError("the decoder is not loaded")

    def rounds(self) -> list[tuple[str, set[int]]]:
        """Verbs in order with their seeds, consecutive calls of one verb merged."""
        grouped = groupby(self.log, key=lambda entry: entry[0])
        return [(verb, {seed for _, seeds in calls for seed in seeds}) for verb, calls in grouped]

    def _logged(self, verb: str, requests: Sequence[ImageRequest], run: Callable[[], T]) -> T:
        assert self._alone.acquire(blocking=False), "two verbs at once"
        try:
            self.log.append((verb, [request.seed for request in requests]))
            return run()
        finally:
            self._alone.release()


StagedLine = Line[Staged]


@pytest.fixture
def line(tmp_path: Path) -> Iterator[StagedLine]:
    """A line; stopped afterwards if the test started it."""
    with EmbeddedServer.ensure(tmp_path / "queue") as server:
        store = Store.connect(server.url)
        line = Line(tmp_path, store, Staged(), BATCHES_PAY)
        yield line
        if line._threads[0].ident is not None:
            line.drain()
        store.close()


def seeds(*numbers: int, prompt: str = "a cat", steps: int = 4) -> list[ImageRequest]:
    return [request(prompt, seed=n, steps=steps) for n in numbers]


def test_phases_run_one_after_another(line: StagedLine) -> None:
    line.submit(*seeds(*range(10)))
    line.start()
    assert line.finished().counts.succeeded == 10
    every_seed = set(range(10))
    expected = [("encode", every_seed), ("step", every_seed), ("decode", every_seed)]
    assert line.pipeline.rounds() == expected


def test_round_is_limited(line: StagedLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "ROUND", 6)
    line.submit(*seeds(*range(8), steps=1))
    line.start()
    assert line.finished().counts.succeeded == 8
    assert [(verb, len(seeds)) for verb, seeds in line.pipeline.rounds()] == [
        *(("encode", 6), ("step", 6), ("decode", 6)),
        *(("encode", 2), ("step", 2), ("decode", 2)),
    ]


def test_late_images_make_the_next_round(line: StagedLine) -> None:
    line.submit(*seeds(1, 2, 3))
    late = iter([lambda: line.submit(*seeds(4, 5))])
    line.pipeline.before_step = lambda: next(late, lambda: None)()  # type: ignore[assignment, return-value]
    line.start()
    line.finished(0)
    line.finished(1)
    assert line.pipeline.rounds()[0] == ("encode", {1, 2, 3})
    assert line.pipeline.rounds()[3:] == [("encode", {4, 5}), ("step", {4, 5}), ("decode", {4, 5})]


def test_failing_image_fails_alone(line: StagedLine) -> None:
    line.submit(*seeds(1, 2), *seeds(3, prompt="[raise]"), *seeds(4, prompt="[refuse]"))
    line.start()
    assert (line.finished().counts.succeeded, line.finished().counts.failed) == (2, 2)


def test_solo_image_has_a_round_of_its_own(line: StagedLine) -> None:
    line.submit(*seeds(1))
    line.store.claim("fake", "dead", limit=1, lease_seconds=0.001, nonce="n")
    line.submit(*seeds(2, 3))
    wait_until(line.store.sweep)
    line.start()
    line.finished(0)
    line.finished(1)
    encoded = [seeds for verb, seeds in line.pipeline.rounds() if verb == "encode"]
    assert {1} in encoded
    assert len(line.pipeline.rounds()) == 3 * len(encoded)


def test_cancelled_images_leave_and_no_previews_are_made(line: StagedLine) -> None:
    line.submit(*seeds(1, 2))

    def cancel() -> None:
        for flight in line.flights.all():
            flight.wished = True
            if flight.lease.request.seed == 2:
                flight.drop()

    line.pipeline.before_step = cancel
    line.start()
    wait_until(lambda: line.job().counts.succeeded == 1)
    wait_until(lambda: len(line.flights) == 0)
    assert line.pipeline.rounds()[-1] == ("decode", {1})


def test_drain_finishes_running_images_only(
    line: StagedLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "ROUND", 6)
    line.submit(*seeds(*range(8)))
    denoising = threading.Event()
    line.pipeline.before_step = denoising.set
    line.start()
    assert denoising.wait(PATIENCE)
    line.drain()
    assert line.job().counts.succeeded == 6
    assert len(line.pipeline.rounds()) == 3


def test_only_the_open_phase_can_be_ended() -> None:
    phases = Phases(phased=True)
    assert phases.wait(Phase.ENCODE, 0)
    assert not phases.wait(Phase.DENOISE, 0)
    with pytest.raises(RuntimeError, match="DECODE"):
        phases.end(Phase.DECODE)
    phases.end(Phase.ENCODE)
    assert phases.wait(Phase.DENOISE, 0)


def test_all_phases_are_open_if_not_phased() -> None:
    phases = Phases(phased=False)
    assert all(phases.wait(phase, 0) for phase in Phase)
    phases.end(Phase.DECODE)
