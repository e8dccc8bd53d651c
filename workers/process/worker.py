"""One worker process: loads its model, then wires intake, engine, delivery and heartbeat.

    main thread   engine: forward passes
    intake        claims, encodes prompts ahead
    delivery      decodes, writes, commits
    heartbeat     extends leases, reports, sweeps
    collector     removes the files of jobs that are gone

SIGTERM drains: nothing more is claimed, what has not started is given back at once, what runs may
finish for a while. The death of the process that started this one does the same, faster. Of a group
of ranks this is the leader; when it loses the group, it gives back what it holds and ends.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import structlog

from jobs.catalog import Model
from jobs.errors import ConfigurationError, GroupLost, ImagemillError, StorageUnavailable
from jobs.image_store import LocalImages
from jobs.queue.store import Store
from pipelines.load import dismiss, load_pipeline
from pipelines.seam import Pipeline
from workers import memory, metrics, profile
from workers.cards import Cards
from workers.collector import Collector
from workers.delivery import Delivery
from workers.engine import Engine
from workers.heartbeat import REGISTERED_SECONDS, Heartbeat, worker_name
from workers.in_flight import Flight, Flights
from workers.intake import Intake
from workers.phases import Phases
from workers.process.launch import EXIT_GROUP_LOST, ORPHANED_SECONDS, Place, exit_code
from workers.rebalance import REST_SECONDS, idle_neighbours, surplus
from workers.scheduler import Costs
from workers.settings import WorkerSettings

log = structlog.get_logger(__name__)

FAILED_SECONDS = 90.0
"""How long a worker that could not start stays registered, so that people can read why."""

LOADING_BEAT_SECONDS = 2.0
"""Seconds between two registrations while the model loads."""

LAST_WORDS_SECONDS = 2.0
"""How long a worker on its way out waits for a thread that may be slow: what was finished before
its group was lost is delivered, and a job's files are removed."""

RATE_SMOOTHING = 0.3
"""Weight of the newest beat in the moving average of steps per second."""


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
        self._rate: float | None = None
        self._seen = (0.0, 0)
        self._engine: Engine | None = None
        self._delivery: Delivery | None = None
        self._intake: Intake | None = None
        self._flights = Flights()
        self._draining = threading.Event()
        tokenizer = settings.tokenizer_file(model.name)
        self._cards = Cards(model, store, tokenizer, self._patiently)

    def run(self) -> int:
        """Load, serve until told to stop, give back what is left; the process's exit code."""
        signal.signal(signal.SIGTERM, lambda *_: self.drain())
        is_supervised = self._place.watch_starter(lambda: self.drain(ORPHANED_SECONDS))
        on_interrupt = signal.SIG_IGN if is_supervised else lambda *_: self.drain()
        signal.signal(signal.SIGINT, on_interrupt)
        try:
            pipeline, costs = self._load()
            self._publish(pipeline, costs)
        except Exception as error:  # of any library: people must be able to read why
            return self._failed(error)
        try:
            self._serve(pipeline, costs)
        finally:
            dismiss(pipeline)
        return 0

    def drain(self, seconds: float | None = None) -> None:
        """Claim no more, give back what has not started, finish the rest within `seconds`.

        None means the settings' `drain_seconds`.
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
            memory.settle(self._device)  # first, so that what is measured is what requests will get
            return pipeline, profile.warm_up(pipeline, self._model, self._device, data)
        finally:
            loaded.set()
            reporting.join()

    def _failed(self, error: Exception) -> int:
        """Say why this worker cannot start; the exit code. A group may end while it starts."""
        if isinstance(error, GroupLost) and self._draining.is_set():
            self._patiently(lambda: self._store.unregister(self.name))
            return 0
        is_ours = isinstance(error, ImagemillError)
        reason = str(error) if is_ours else f"{type(error).__name__}: {error}"
        self._state, self._error = "failed", reason
        log.error(
            "worker cannot start", model=self._model.name, reason=reason, exc_info=not is_ours
        )
        self._register(FAILED_SECONDS)
        if isinstance(error, ConfigurationError):
            sys.stderr.write(f"{error}\n")
        return exit_code(error, self._model)

    def _publish(self, pipeline: Pipeline, costs: Costs) -> None:
        """Tell the service what the model turned out to be."""
        tokens, usual = profile.usual_tokens(pipeline, self._model), profile.probe(self._model)
        measured = {
            "costs": costs.points,
            "pinned": costs.pinned(tokens),
            "largest": costs.largest(tokens),
            "image_tokens_per_pixel": pipeline.tokens(usual) / usual.pixels,
        }
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
        taking, delivering = _thread("intake", intake.run), _thread("delivery", delivery.run)
        _thread("costs", keeper.run)
        try:
            engine.run()
        except GroupLost as error:
            self._end_without_group(error, taking, delivering)
        taking.join()
        delivery.close()
        delivering.join()
        for stop in (heartbeat.stop, self._collector.stop, keeper.stop):
            stop()
        beating.join()
        collecting.join(LAST_WORDS_SECONDS)
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
            share=lambda: self._share(engine, intake),
        )

    def _end_without_group(
        self, error: GroupLost, taking: threading.Thread, delivering: threading.Thread
    ) -> None:
        """Nothing more can be denoised here: give back what did not run, and go.

        One of the images that ran may be what broke the group, by its memory or otherwise. Their
        leases are left to run out, as when a worker dies: then they come again alone, and one that
        breaks every group fails in the end. What was finished before is delivered. A thread that
        hangs in a forward pass is not waited for, which is why the process exits from here.
        """
        log.error("group lost", worker=self.name, reason=str(error))
        assert self._intake and self._delivery and self._engine
        for flight in self._engine.suspects:
            flight.drop()
            self._flights.remove(flight)
        self._intake.stopping.set()
        self._release([f for f in self._flights.all() if f.sample is None or not f.sample.done])
        self._delivery.close()
        taking.join(LAST_WORDS_SECONDS)
        delivering.join(LAST_WORDS_SECONDS)
        self._release(self._flights.all())
        with suppress(StorageUnavailable):
            self._store.unregister(self.name)
        os._exit(EXIT_GROUP_LOST)

    def _release(self, flights: list[Flight]) -> None:
        """Give these back, burning no attempt; where the queue is away their leases run out."""
        with suppress(StorageUnavailable):
            self._store.release([flight.lease for flight in flights])
        for flight in flights:
            flight.drop()
            self._flights.remove(flight)

    def _leave(self) -> None:
        """Out of time: give everything back and go, whatever is still running."""
        leases = [flight.lease for flight in self._flights.all()]
        log.warning("drain took too long", given_back=len(leases))
        try:
            self._store.release(leases)
            self._store.unregister(self.name)
        finally:
            os._exit(0)

    def _patiently(self, write: Callable[[], object]) -> None:
        """Write to a queue that may be away for the moment; on the way out, only once."""
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

    def _share(self, engine: Engine, intake: Intake) -> None:
        """Leave what has not begun to idle neighbours, when the queue has nothing for them."""
        unstarted = engine.unstarted
        if not intake.is_starved or intake.rests or not unstarted:
            return
        idle = idle_neighbours(self._store.workers(), self.name, self._model.name)
        if count := surplus(len(self._flights), unstarted, idle):
            log.info("sharing with idle workers", worker=self.name, images=count, idle=idle)
            intake.rest(REST_SECONDS)
            engine.surplus = count

    def _describe(self) -> dict[str, Any]:
        """What this worker is doing, for people and for the ETA; rates are per second."""
        engine, delivery = self._engine, self._delivery
        self._measure()
        return {
            "model": self._model.name,
            "state": self._state,
            "error": self._error or (delivery.trouble if delivery else None),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "device": self._device,
            "placement": self._model.placement,
            "ranks": self._model.ranks,
            "group": self._place.group,
            "started": self._started,
            "in_flight": len(self._flights),
            "images_done": delivery.delivered if delivery else 0,
            "steps_per_second": self._rate,
            "forwards": engine.slots.forwards if engine else 0,
            "steps": engine.steps if engine else 0,
            "at": time.time(),
            "busy_seconds": engine.slots.busy_seconds if engine else 0.0,
            "held_pixel_steps": self._flights.pixel_steps(),
            "memory": metrics.device_memory(self._device),
            **(engine.slots.describe(len(self._flights)) if engine else {}),
        }

    def _measure(self) -> None:
        """Moving average of samples x steps per second of denoising, kept while idle."""
        if not self._engine:
            return
        busy, steps = self._engine.slots.busy_seconds, self._engine.steps
        elapsed, made = busy - self._seen[0], steps - self._seen[1]
        if made <= 0 or elapsed <= 0:
            return
        rate = made / elapsed
        old = self._rate
        self._rate = rate if old is None else old + RATE_SMOOTHING * (rate - old)
        self._seen = (busy, steps)


def _thread(name: str, run: Callable[[], None]) -> threading.Thread:
    """Start `run` on a daemon thread; if it ever raises, the whole process ends.

    A worker with a dead thread would hold leases for ever; the supervisor starts a new one.
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
