"""A worker process: loads its model, then connects intake, engine, delivery and heartbeat.

    main thread   engine: forward passes
    intake        claims images, encodes prompts ahead
    delivery      decodes, writes, commits
    heartbeat     extends leases, reports, sweeps
    collector     removes the files of expired and deleted jobs
    costs         saves what forward passes cost

SIGTERM drains the worker: it claims nothing more, gives unstarted images back at once, and lets
running ones finish for a while. It does the same, with less time, if the process that started it
dies. In a group of ranks this is the leader. If it loses the group, it gives its images back and
exits.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import structlog

from jobs.catalog import Model
from jobs.errors import ConfigurationError, GroupLost, ImagemillError, StorageUnavailable
from jobs.image_store import LocalImages
from jobs.queue.store import Store
from jobs.reports import Measured, WorkerReport
from pipelines.load import dismiss, load_pipeline
from pipelines.seam import Pipeline
from workers import memory, metrics, profile
from workers.cards import Cards
from workers.collector import Collector
from workers.delivery import Delivery
from workers.engine import Engine
from workers.heartbeat import REGISTERED_SECONDS, Heartbeat, worker_name
from workers.in_flight import InFlight, InFlightImages
from workers.intake import Intake
from workers.pass_timer import probe
from workers.phases import Phases
from workers.process.launch import EXIT_GROUP_LOST, ORPHANED_SECONDS, Place, exit_code
from workers.rebalance import REST_SECONDS, idle_workers, surplus
from workers.scheduler import Costs
from workers.settings import WorkerSettings

log = structlog.get_logger(__name__)

FAILED_SECONDS = 90.0
"""How long a worker that couldn't start stays registered, so people can read why."""

LOADING_BEAT_SECONDS = 2.0
"""Seconds between two registrations while the model loads."""

EXIT_SECONDS = 2.0
"""How long an exiting worker waits for a thread that may be slow: delivery after a lost group,
and the collector, which may be removing a large job's files."""


class Worker:
    """A worker of one model on one device, or the leader of a group of ranks."""

    def __init__(
        self, *, model: Model, place: Place, settings: WorkerSettings, store: Store
    ) -> None:
        self.name = worker_name(model.name, place.index)
        self._model, self._place, self._settings, self._store = model, place, settings, store
        self._device = place.device
        self._images = LocalImages(settings.data / "images")
        self._collector = Collector(store, self._images)
        self._state = "starting"
        self._error: str | None = None
        self._started = time.time()
        self._rate = metrics.StepRate()
        self._engine: Engine | None = None
        self._delivery: Delivery | None = None
        self._intake: Intake | None = None
        self._flights = InFlightImages()
        self._draining = threading.Event()
        tokenizer = settings.tokenizer_file(model.name)
        self._cards = Cards(model, store, tokenizer, self._patiently)

    def run(self) -> int:
        """Load, serve until stopped, give back what's left; returns the process's exit code."""
        signal.signal(signal.SIGTERM, lambda *_: self.drain())
        is_supervised = self._place.watch_starter(lambda: self.drain(ORPHANED_SECONDS))
        on_interrupt = signal.SIG_IGN if is_supervised else lambda *_: self.drain()
        signal.signal(signal.SIGINT, on_interrupt)
        try:
            pipeline, costs = self._load()
            self._publish(pipeline, costs)
        except Exception as error:  # libraries may raise anything, and people need to read why
            return self._failed(error)
        try:
            self._serve(pipeline, costs)
        finally:
            dismiss(pipeline)
        return 0

    def drain(self, seconds: float | None = None) -> None:
        """Stop claiming, give unstarted images back, finish the rest within `seconds`.

        `seconds` defaults to the settings' `drain_seconds`.
        """
        if self._draining.is_set():
            return
        self._draining.set()
        self._state = "draining"
        if self._intake and self._engine:
            self._intake.stopping.set()
            self._engine.stopping.set()
        limit = self._place.drain_seconds(self._settings) if seconds is None else seconds
        timer = threading.Timer(limit, self._leave)
        timer.daemon = True
        timer.start()

    def _load(self) -> tuple[Pipeline, Costs]:
        loaded = threading.Event()

        def report() -> None:
            while True:
                self._register(REGISTERED_SECONDS)
                if loaded.wait(LOADING_BEAT_SECONDS):
                    return

        reporting = threading.Thread(target=report, name="loading", daemon=True)
        reporting.start()
        try:
            self._model = self._cards.introduce()
            pipeline, data = load_pipeline(self._model, self._device), self._settings.data
            memory.settle(self._device)  # before warm-up, so it measures what requests get
            return pipeline, profile.warm_up(pipeline, self._model, self._device, data)
        finally:
            loaded.set()
            reporting.join()

    def _failed(self, error: Exception) -> int:
        """Report why this worker can't start; returns the exit code.

        Losing the group isn't a failure while draining, because its ranks may have been stopped.
        """
        if isinstance(error, GroupLost) and self._draining.is_set():
            self._patiently(lambda: self._store.unregister(self.name))
            return 0
        is_ours = isinstance(error, ImagemillError)
        reason = str(error) if is_ours else f"{type(error).__name__}: {error}"
        self._state, self._error = "failed", reason
        log.error("worker can't start", model=self._model.name, reason=reason, exc_info=not is_ours)
        self._register(FAILED_SECONDS)
        if isinstance(error, ConfigurationError):
            sys.stderr.write(f"{error}\n")
        return exit_code(error, self._model)

    def _publish(self, pipeline: Pipeline, costs: Costs) -> None:
        """Publish the model's card for the service."""
        tokens, usual = profile.usual_tokens(pipeline, self._model), probe(self._model)
        measured = Measured(
            costs=costs.points,
            pinned=costs.pinned(tokens),
            largest=costs.largest(tokens),
            image_tokens_per_pixel=pipeline.tokens(usual) / usual.pixels,
        )
        self._cards.publish(pipeline.card, pipeline.tokenizer_json(), measured)

    def _serve(self, pipeline: Pipeline, costs: Costs) -> None:
        phases = Phases(phased=pipeline.phased)
        keeper = profile.keeper(pipeline, self._model, self._device, self._settings.data, costs)
        delivery = Delivery(
            model=self._model,
            store=self._store,
            images=self._images,
            pipeline=pipeline,
            flights=self._flights,
            phases=phases,
        )
        intake = Intake(
            model=self._model.name,
            name=self.name,
            store=self._store,
            pipeline=pipeline,
            settings=self._settings,
            flights=self._flights,
            capacity=lambda: engine.capacity(),
            give_up=delivery.give_up,
            give_back=delivery.give_back,
            phases=phases,
        )
        engine = Engine(
            pipeline=pipeline,
            costs=costs,
            usual_tokens=profile.usual_tokens(pipeline, self._model),
            flights=self._flights,
            ready=intake.ready,
            deliver=delivery.put,
            show=delivery.show,
            give_up=delivery.give_up,
            phases=phases,
            round_over=delivery.decode_all,
            give_back=delivery.give_back,
            learner=keeper.learner,
        )
        heartbeat = self._heartbeat(engine, intake)
        self._intake, self._engine, self._delivery = intake, engine, delivery
        if self._draining.is_set():
            return
        self._state = "ready"
        log.info("worker ready", worker=self.name, model=self._model.name, device=self._device)
        beating = _thread("heartbeat", heartbeat.run)
        collecting = _thread("collector", self._collector.run)
        claiming, delivering = _thread("intake", intake.run), _thread("delivery", delivery.run)
        _thread("costs", keeper.run)
        try:
            engine.run()
        except GroupLost as error:
            self._exit_without_group(error, claiming, delivering)
        claiming.join()
        delivery.close()
        delivering.join()
        for stop in (heartbeat.stop, self._collector.stop, keeper.stop):
            stop()
        beating.join()
        collecting.join(EXIT_SECONDS)
        self._patiently(lambda: self._store.unregister(self.name))
        log.info("worker drained", worker=self.name, delivered=delivery.delivered)

    def _heartbeat(self, engine: Engine, intake: Intake) -> Heartbeat:
        return Heartbeat(
            name=self.name,
            store=self._store,
            settings=self._settings,
            flights=self._flights,
            describe=self._describe,
            stuck=self._stuck,
            rebalance=lambda: self._rebalance(engine, intake),
        )

    def _exit_without_group(
        self, error: GroupLost, claiming: threading.Thread, delivering: threading.Thread
    ) -> None:
        """Give back the images that weren't running, deliver finished ones, and exit.

        One of the running images may have broken the group, by its memory or otherwise. Their
        leases are left to expire, as if the worker had died, so each comes back to run alone, and
        one that breaks every group fails in the end. The process exits here, without waiting for
        threads that may hang in a forward pass.
        """
        log.error("group lost", worker=self.name, reason=str(error))
        assert self._intake and self._delivery and self._engine
        for flight in self._engine.suspects:
            flight.drop()
            self._flights.remove(flight)
        self._intake.stopping.set()
        self._release([f for f in self._flights.all() if f.sample is None or not f.sample.done])
        self._delivery.close()
        claiming.join(EXIT_SECONDS)
        delivering.join(EXIT_SECONDS)
        self._release(self._flights.all())
        with suppress(StorageUnavailable):
            self._store.unregister(self.name)
        os._exit(EXIT_GROUP_LOST)

    def _release(self, flights: list[InFlight]) -> None:
        """Give these back without using up an attempt; if the queue is down, leases expire."""
        with suppress(StorageUnavailable):
            self._store.release([flight.lease for flight in flights])
        for flight in flights:
            flight.drop()
            self._flights.remove(flight)

    def _leave(self) -> None:
        """Give everything back and exit, because the drain time is over."""
        leases = [flight.lease for flight in self._flights.all()]
        log.warning("drain took too long", given_back=len(leases))
        try:
            self._store.release(leases)
            self._store.unregister(self.name)
        finally:
            os._exit(0)

    def _patiently(self, write: Callable[[], object]) -> None:
        """Retry a write while the queue is unavailable; while draining, try only once."""
        while True:
            try:
                write()
            except StorageUnavailable as error:
                log.warning("queue unavailable", reason=str(error))
                if self._draining.wait(LOADING_BEAT_SECONDS):
                    return
            else:
                return

    def _register(self, seconds: float) -> None:
        try:
            self._store.register(self.name, self._describe(), seconds)
        except StorageUnavailable as error:
            log.warning("queue unavailable", reason=str(error))

    def _stuck(self) -> bool:
        started = self._engine.slots.oldest if self._engine else None
        return started is not None and time.monotonic() - started > self._settings.stuck_seconds

    def _rebalance(self, engine: Engine, intake: Intake) -> None:
        """Give unstarted images back for idle workers, if the queue has none for them."""
        unstarted = engine.unstarted
        if not intake.is_starved or intake.rests or not unstarted:
            return
        idle = idle_workers(self._store.workers(), self.name, self._model.name)
        if count := surplus(len(self._flights), unstarted, idle):
            log.info(
                "giving images back for idle workers", worker=self.name, images=count, idle=idle
            )
            intake.rest(REST_SECONDS)
            engine.surplus = count

    def _describe(self) -> WorkerReport:
        """This worker's state, for status pages and the ETA."""
        engine, delivery = self._engine, self._delivery
        if engine:
            self._rate.update(engine.slots.busy_seconds, engine.steps)
        report = WorkerReport(
            model=self._model.name,
            state=self._state,
            error=self._error or (delivery.trouble if delivery else None),
            pid=os.getpid(),
            host=socket.gethostname(),
            device=self._device,
            placement=self._model.placement,
            ranks=self._model.ranks,
            group=self._place.group,
            started=self._started,
            in_flight=len(self._flights),
            images_done=delivery.delivered if delivery else 0,
            steps_per_second=self._rate.value,
            forwards=0,
            steps=engine.steps if engine else 0,
            at=time.time(),
            busy_seconds=0.0,
            held_pixel_steps=self._flights.pixel_steps(),
            memory=metrics.device_memory(self._device),
        )
        return engine.slots.added_to(report) if engine else report


def _thread(name: str, run: Callable[[], None]) -> threading.Thread:
    """Start `run` on a daemon thread; if it raises, the whole process exits.

    Otherwise a worker with a dead thread would hold its leases forever. The supervisor restarts it.
    """

    def guarded() -> None:
        try:
            run()
        except BaseException:
            log.exception("worker thread failed", thread=name)
            os._exit(1)

    thread = threading.Thread(target=guarded, name=name, daemon=True)
    thread.start()
    return thread
