"""Intake, engine and delivery of a worker over a fake pipeline and a real queue."""

import threading
import uuid
from pathlib import Path
from typing import Generic, TypeVar

from jobs.catalog import Model
from jobs.image_store import LocalImages
from jobs.job import Job
from jobs.queue.store import Store
from jobs.request import ImageRequest
from pipelines.fake import FakePipeline
from tests.waiting import PATIENCE, wait_until
from workers.delivery import Delivery
from workers.engine import Engine
from workers.in_flight import InFlightImages
from workers.intake import Intake
from workers.phases import Phases
from workers.scheduler import Costs
from workers.settings import WorkerSettings

P = TypeVar("P", bound=FakePipeline)


class Line(Generic[P]):
    """The three threads of a worker over a fake pipeline, without a heartbeat."""

    def __init__(self, folder: Path, store: Store, pipeline: P, costs: Costs) -> None:
        self.store, self.pipeline, self.flights = store, pipeline, InFlightImages()
        self.job_ids: list[str] = []
        phases = Phases(phased=pipeline.phased)
        model = Model("fake", "/nowhere", local=True)
        self.images = LocalImages(folder / "images")
        self.delivery = Delivery(
            model=model,
            store=store,
            images=self.images,
            pipeline=self.pipeline,
            flights=self.flights,
            phases=phases,
        )
        self.intake = Intake(
            model="fake",
            name=uuid.uuid4().hex,
            store=store,
            pipeline=self.pipeline,
            settings=WorkerSettings(),
            flights=self.flights,
            capacity=lambda: self.engine.capacity(),
            give_up=self.delivery.give_up,
            give_back=self.delivery.give_back,
            phases=phases,
        )
        self.engine = Engine(
            pipeline=self.pipeline,
            costs=costs,
            usual_tokens=32,
            flights=self.flights,
            ready=self.intake.ready,
            deliver=self.delivery.put,
            show=self.delivery.show,
            give_up=self.delivery.give_up,
            phases=phases,
            round_over=self.delivery.decode_all,
            give_back=self.delivery.give_back,
        )
        runs = (self.intake.run, self.engine.run, self.delivery.run)
        self._threads = [threading.Thread(target=run) for run in runs]

    def submit(self, *requests: ImageRequest, tenant: str = "t", priority: int = 5) -> str:
        """Submit a job of these images."""
        submitted = self.store.submit(
            requests,
            tenant=tenant,
            priority=priority,
            metadata={},
            spec={},
            quota=1000,
            keep_seconds=3600,
            max_attempts=1,
        )
        self.job_ids.append(submitted.job_id)
        return submitted.job_id

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def job(self, number: int = -1) -> Job:
        """The job's current state."""
        return self.store.job(self.job_ids[number], None)

    def finished(self, number: int = -1) -> Job:
        """Wait until the job has finished."""
        return wait_until(lambda: job if (job := self.job(number)).state.finished else None)

    def drain(self) -> None:
        """Drain and join the threads, as the worker does."""
        self.intake.stopping.set()
        self.engine.stopping.set()
        for thread in self._threads[:2]:
            thread.join(PATIENCE)
        self.delivery.close()
        self._threads[2].join(PATIENCE)
        assert not any(thread.is_alive() for thread in self._threads)
