"""Which failures of a worker are final, what allows another try, and how they're reported."""

import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from jobs.catalog import Model
from jobs.errors import (
    ConfigurationError,
    GroupLost,
    ImageFailed,
    ModelUnavailable,
    OutOfMemory,
    StorageUnavailable,
)
from jobs.queue.decode import WorkerInfo
from jobs.queue.store import Store
from pipelines.loading.checkpoint import find_checkpoint
from pipelines.loading.transient import may_pass
from tests.waiting import wait_until
from workers.process import refusals
from workers.process.launch import Place, exit_code
from workers.process.refusals import FINAL, Notices, ground_of
from workers.process.worker import Worker
from workers.settings import WorkerSettings

FOLDER = Model("m", "/nowhere", local=True)
HUB = Model("m", "owner/name")


@pytest.mark.parametrize(
    ("error", "model", "is_final"),
    [
        (ConfigurationError("the entry asks for what is not there"), FOLDER, True),
        (ConfigurationError("the entry asks for what is not there"), HUB, True),
        (ModelUnavailable("a file is missing"), FOLDER, True),
        (ModelUnavailable("a file is missing"), HUB, False),
        (ModelUnavailable("no memory", may_pass=True), FOLDER, False),
        (OutOfMemory("the device is full"), FOLDER, False),
        (GroupLost("rank 1 is gone"), FOLDER, False),
        (ImageFailed("the warm-up's image"), FOLDER, False),
        (RuntimeError("a library's own"), FOLDER, False),
    ],
)
def test_only_lasting_errors_are_final(error: Exception, model: Model, is_final: bool) -> None:
    assert (exit_code(error, model) in FINAL) == is_final


def chained(cause: Exception) -> Exception:
    """The error as a library wraps it."""
    try:
        try:
            raise cause
        except Exception as error:
            raise ValueError("cannot be read") from error
    except ValueError as error:
        return error


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError(errno.EIO, "Input/output error"), True),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (OSError("no file named config.json"), False),
        (KeyError("weight_map"), False),
    ],
)
def test_memory_and_disk_errors_may_pass(error: Exception, passes: bool) -> None:
    assert may_pass(error) == passes
    assert may_pass(chained(error)) == passes


def test_unreachable_hub_may_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no route to the hub")

    monkeypatch.setattr("diffusers.DiffusionPipeline.download", fail)
    with pytest.raises(ModelUnavailable) as caught:
        find_checkpoint(HUB)
    assert caught.value.may_pass


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    """A catalog of two models with folders."""
    for name in ("a", "b"):
        (tmp_path / name / "vae").mkdir(parents=True)
        (tmp_path / name / "vae" / "config.json").write_text("{}")
    (tmp_path / "linked").mkdir()
    (tmp_path / "a" / "unet").symlink_to(tmp_path / "linked")
    (tmp_path / "a" / "itself").symlink_to(tmp_path / "a")
    path = tmp_path / "models.toml"
    path.write_text('[models.a]\npath = "./a"\n[models.b]\npath = "./b"\n')
    return path


def write(path: Path, text: str) -> None:
    """Write a file with a new modification time, however coarse the file system's clock."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    path.write_text(text)
    os.utime(path, ns=(before + 10**9, before + 10**9))


CHANGES: dict[str, Callable[[Path], object]] = {
    "a file": lambda folder: write(folder / "a" / "vae" / "config.json", "{ }"),
    "a file of the same size": lambda folder: write(folder / "a" / "vae" / "config.json", "[]"),
    "a new file": lambda folder: write(folder / "a" / "vae" / "model.safetensors", ""),
    "a file in a linked folder": lambda folder: write(folder / "linked" / "config.json", "{ }"),
    "a file is gone": lambda folder: (folder / "a" / "vae" / "config.json").unlink(),
    "the folder is gone": lambda folder: (folder / "a").rename(folder / "c"),
    "the entry": lambda folder: write(
        folder / "models.toml", '[models.a]\npath = "./a"\ndtype = "float32"\n'
    ),
    "the entry is gone": lambda folder: write(folder / "models.toml", '[models.b]\npath = "./b"\n'),
    "the catalog is broken": lambda folder: write(folder / "models.toml", "[models"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_that_allow_another_try(catalog: Path, change: str) -> None:
    before = ground_of(catalog, "a")
    assert ground_of(catalog, "a") == before
    CHANGES[change](catalog.parent)
    after = ground_of(catalog, "a")
    assert after != before
    assert ground_of(catalog, "a") == after


def test_changes_of_other_models_do_not_count(catalog: Path) -> None:
    before = ground_of(catalog, "a")
    write(catalog.parent / "b" / "vae" / "config.json", "{ }")
    write(catalog, catalog.read_text() + 'dtype = "float32"\n')
    assert ground_of(catalog, "a") == before


def test_single_file_and_broken_catalog_are_checked(catalog: Path) -> None:
    weights = catalog.parent / "one.safetensors"
    weights.write_text("x")
    write(catalog, '[models.a]\npath = "./one.safetensors"\n')
    before = ground_of(catalog, "a")
    write(weights, "y")
    assert ground_of(catalog, "a") != before
    write(catalog, "[models")
    broken = ground_of(catalog, "a")
    write(catalog, "[model")
    assert ground_of(catalog, "a") != broken


@pytest.fixture
def notices(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Notices]:
    """Notices that renew without pauses, in a store that they don't close."""
    monkeypatch.setattr(store, "close", lambda: None)
    monkeypatch.setattr(refusals, "RENEW_SECONDS", 0.01)
    monkeypatch.setattr(refusals, "LOOK_SECONDS", 0.01)
    notices = Notices(lambda: store)
    yield notices
    notices.end(60)


def failed(store: Store, folder: Path, tmp_path: Path, local: bool = True) -> WorkerInfo:
    """What a real worker of a broken folder registers before it exits."""
    settings = WorkerSettings(data=tmp_path / "data")
    model = Model("m", str(folder), local=local, dtype="float32")
    worker = Worker(model=model, place=Place("cpu"), settings=settings, store=store)
    code = worker._failed(ModelUnavailable(f"model 'm': the file {folder}/x is missing"))
    assert code in FINAL
    [info] = store.workers()
    return info


def test_workers_reason_stays_registered(store: Store, notices: Notices, tmp_path: Path) -> None:
    own = failed(store, tmp_path, tmp_path)
    store.register(own.id, own.report, 5)
    with capture_logs() as logs:
        notices.put("m.0", [os.getpid()], "m", "cpu", 66)
        wait_until(lambda: store.workers()[0].report.at != own.report.at)
        notices.put("m.1", [1], "m", "cpu", 66)
        wait_until(lambda: len(store.workers()) == 2)
    [refused] = [worker for worker in store.workers() if worker.id == own.id]
    assert refused.report.error == own.report.error
    assert refused.report.failed
    reasons = [line["reason"] for line in logs if line["event"].startswith("model can't be served")]
    assert reasons.count(own.report.error) == 1
    notices.drop("m.0")
    notices.drop("m.1")
    wait_until(lambda: not store.workers())


def test_worker_without_a_reason_gets_a_default(store: Store, notices: Notices) -> None:
    notices.put("m.0", [1], "m", "cuda:0", 2)
    [worker] = wait_until(store.workers)
    assert (
        worker.report.error == "its worker exited with code 2; see the workers' log for the reason"
    )
    assert (worker.report.model, worker.report.device) == ("m", "cuda:0")
    assert worker.report.host == socket.gethostname()
    notices.end(120)
    assert store.workers() == []


def test_notices_wait_for_the_queue(
    store: Store, notices: Notices, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def away() -> list[WorkerInfo]:
        tries.append(1)
        raise StorageUnavailable("starting")

    with monkeypatch.context() as context:
        context.setattr(store, "workers", away)
        notices.put("m.0", [1], "m", "cpu", 2)
        wait_until(lambda: len(tries) > 2)
    wait_until(store.workers)
