"""An engine over a fake pipeline, run on the test's own thread; a queue, and a model to serve."""

import json
import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from jobs.catalog import Model
from jobs.job import Lease
from jobs.queue.store import Store
from jobs.request import ImageRequest
from jobs.runtime.embedded_queue import EmbeddedServer
from pipelines.fake import FakePipeline
from tests.pipelines.serving import entry
from workers.engine import Engine
from workers.in_flight import InFlight, InFlightImages
from workers.scheduler import BUCKETS, Costs

BATCHES_PAY = Costs(tuple((2 * 16 * b, 1.0) for b in BUCKETS))
"""Costs of a device on which every bucket of guided 64x64 requests pays."""


def request(prompt: str = "a cat", **changes: object) -> ImageRequest:
    """A fast-class 64x64 request of 4 steps, with these changes."""
    fields = {
        "model": "fake",
        "prompt": prompt,
        "seed": 0,
        "width": 64,
        "height": 64,
        "steps": 4,
        "guidance_scale": 2.0,
        "reproducible": False,
    }
    return ImageRequest(**{**fields, **changes})  # type: ignore[arg-type]


@dataclass
class Bench:
    """An engine and its results: delivered images, and errors by prompt."""

    pipeline: FakePipeline
    costs: Costs = BATCHES_PAY
    flights: InFlightImages = field(default_factory=InFlightImages)
    delivered: list[InFlight] = field(default_factory=list)
    failed: dict[str, BaseException] = field(default_factory=dict)
    shown: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ready: queue.SimpleQueue[InFlight] = queue.SimpleQueue()
        self.engine = Engine(
            pipeline=self.pipeline,
            costs=self.costs,
            usual_tokens=2 * 16,
            flights=self.flights,
            ready=self.ready,
            deliver=self._deliver,
            show=lambda flight, sample: self.shown.append(sample.step),
            give_up=self._give_up,
        )

    def enqueue(self, *requests: ImageRequest) -> list[InFlight]:
        """Make these requests ready, as intake does."""
        flights = []
        for request in requests:
            flight = InFlight(Lease("job", len(self.flights), "token", 1, False, request))
            [flight.conditioning] = self.pipeline.encode([request])
            self.flights.add(flight)
            self.ready.put(flight)
            flights.append(flight)
        return flights

    def run(self) -> None:
        """Run the engine until nothing is in flight."""
        self.engine.run()

    def _deliver(self, flight: InFlight) -> None:
        self.delivered.append(flight)
        self._left(flight)

    def _give_up(self, flight: InFlight, error: BaseException) -> None:
        self.failed[flight.lease.request.prompt] = error
        self._left(flight)

    def _left(self, flight: InFlight) -> None:
        """Stop the engine after the last image."""
        out = {id(flight) for flight in self.delivered} | set(self.failed)
        if len(out) + sum(f.dropped for f in self.flights.all()) >= len(self.flights):
            self.engine.stopping.set()


@pytest.fixture
def bench() -> Callable[..., Bench]:
    """Makes a `Bench` over a fake pipeline with these options."""
    return lambda costs=BATCHES_PAY, **options: Bench(FakePipeline(**options), costs)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer.ensure(tmp_path / "queue") as server:
        yield server


@pytest.fixture
def store(server: EmbeddedServer) -> Iterator[Store]:
    opened = Store.connect(server.url)
    yield opened
    opened.close()


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """The entry of a fake pipeline's folder that real worker processes can load."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FakePipeline"}))
    return entry(folder)
