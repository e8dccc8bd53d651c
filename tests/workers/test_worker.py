"""A worker process: what it publishes before its model is loaded, and how its threads interact."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.catalog import Model
from jobs.errors import ModelUnavailable
from jobs.image_store import LocalImages
from jobs.queue.store import Store
from jobs.reports import Measured, ModelCard
from pipelines.fake import FakePipeline
from tests.waiting import PATIENCE, wait_until
from tests.workers.conftest import BATCHES_PAY
from workers.process.launch import Place
from workers.process.worker import Worker
from workers.settings import WorkerSettings

MEASURED = Measured(costs=((64, 0.5),), pinned=4, largest=8)


def loading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Store, model: Model) -> None:
    """Run a worker up to the point where it would load its weights."""

    def fail(model: Model, device: str) -> None:
        raise ModelUnavailable("so far")

    monkeypatch.setattr("workers.process.worker.load_pipeline", fail)
    settings = WorkerSettings(data=tmp_path / "data")
    worker = Worker(model=model, place=Place("cpu"), settings=settings, store=store)
    with pytest.raises(ModelUnavailable, match="so far"):
        worker._load()


def test_card_is_published_before_loading(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Store, model: Model
) -> None:
    loading(monkeypatch, tmp_path, store, model)
    assert store.card(model.name) == ModelCard(model.source, {}, FakePipeline().card)


def test_defaults_are_published_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Store, model: Model
) -> None:
    def fail(model: Model) -> None:
        raise ModelUnavailable("no card")

    entry = replace(model, unset=("steps", "width"))
    monkeypatch.setattr("workers.cards.read_card", fail)
    loading(monkeypatch, tmp_path, store, entry)
    published = ModelCard(entry.source, {"steps": 28, "width": 1024})
    assert store.card(model.name) == published
    monkeypatch.undo()
    read = replace(published, properties=FakePipeline().card)
    store.publish_card(model.name, replace(read, source="other", measured=MEASURED))
    loading(monkeypatch, tmp_path, store, entry)
    assert store.card(model.name) == read  # the measurements were of other weights


def test_measurements_are_kept_for_the_same_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Store, model: Model
) -> None:
    loading(monkeypatch, tmp_path, store, model)
    read = store.card(model.name)
    assert read and read.properties
    measured = replace(read, measured=MEASURED)
    store.publish_card(model.name, measured)
    loading(monkeypatch, tmp_path, store, model)
    assert store.card(model.name) == measured
    changed = replace(measured, properties=replace(read.properties, multiple=64))
    store.publish_card(model.name, changed)
    loading(monkeypatch, tmp_path, store, model)
    assert store.card(model.name) == read


def test_unreadable_model_is_left_to_loading(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Store, model: Model
) -> None:
    (Path(model.path) / "model_index.json").write_text("{")
    loading(monkeypatch, tmp_path, store, model)
    assert store.card(model.name) is None


def test_slow_file_removal_blocks_neither_leases_nor_exit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Store, model: Model
) -> None:
    at_work, may_end = threading.Event(), threading.Event()

    def remove_slowly(images: LocalImages, job_id: str) -> None:
        at_work.set()
        assert may_end.wait(PATIENCE)

    monkeypatch.setattr(LocalImages, "remove_job", remove_slowly)
    monkeypatch.setattr("workers.collector.LOOK_SECONDS", 0.001)
    monkeypatch.setattr("workers.process.worker.EXIT_SECONDS", 0.001)
    monkeypatch.setattr(store, "due", lambda limit: ["gone"])
    settings = WorkerSettings(data=tmp_path / "data")
    worker = Worker(model=model, place=Place("cpu"), settings=settings, store=store)
    serving = threading.Thread(target=worker._serve, args=(FakePipeline(), BATCHES_PAY))
    serving.start()
    try:
        assert at_work.wait(PATIENCE)
        [seen] = wait_until(store.workers)
        wait_until(lambda: any(worker.report.at != seen.report.at for worker in store.workers()))
        assert worker._intake and worker._engine
        worker._intake.stopping.set()
        worker._engine.stopping.set()
        serving.join(PATIENCE)
        assert not serving.is_alive()
        assert store.workers() == []
    finally:
        may_end.set()
