"""How much a heavy neighbour delays four images: fair share between callers, and between jobs.

A worker of the bundled model; one caller queues 500 images. Then, at equal priority, another
caller asks for four, and the heavy caller itself asks for four more in a second job. The metric
is the time that those take, over the time that four take on the idle worker.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bench.report import Metrics, table
from jobs import lifeline
from jobs.catalog import load_catalog
from jobs.embedded import EmbeddedServer
from jobs.job import State
from jobs.request import ImageRequest
from jobs.store import Store
from workers.profile import probe

HEAVY, LIGHT = 500, 4


def run(rounds: int = 5) -> Metrics:
    """Solo, beside another caller's 500, beside one's own 500: interleaved rounds."""
    model = load_catalog(Path("models.toml")).get("demo")
    request = replace(probe(model), steps=model.defaults.steps)
    seconds: dict[str, list[float]] = {"alone": [], "other caller": [], "same caller": []}
    with _worker() as store:
        _timed(store, "warm", request)
        for number in range(rounds):
            seconds["alone"].append(_timed(store, f"solo{number}", request))
            heavy = _submit(store, f"heavy{number}", request, HEAVY)
            _until(lambda job=heavy, kept=store: kept.job(job, None).counts.succeeded > 8)  # type: ignore[misc]
            seconds["other caller"].append(_timed(store, f"light{number}", request))
            seconds["same caller"].append(_timed(store, f"heavy{number}", request))
            store.cancel(heavy, None)
            _until(lambda kept=store: _in_flight(kept) == 0)  # type: ignore[misc]
    ratios = {
        name: statistics.median(a / b for a, b in zip(found, seconds["alone"], strict=True))
        for name, found in seconds.items()
    }
    table(
        f"{LIGHT} images beside {HEAVY} queued (seconds; median, min..max)",
        [(name, found, ratios[name]) for name, found in seconds.items()],
    )
    return {
        "fair_other_caller": ratios["other caller"],
        "fair_same_caller": ratios["same caller"],
    }


@contextmanager
def _worker() -> Iterator[Store]:
    data = Path(tempfile.mkdtemp(prefix="imagemill-bench-"))
    with EmbeddedServer.ensure(data) as server:
        store = Store.connect(server.url)
        env = {**os.environ, "IMAGEMILL_DATA": str(data), "IMAGEMILL_REDIS_URL": server.url}
        with open(data / "workers.log", "wb") as log:
            process = lifeline.spawn(
                [sys.executable, "-m", "workers", "--model", "demo"],
                env=env,
                stderr=log,
                stdout=log,
            )
        try:
            _until(lambda: any(w.info.get("state") == "ready" for w in store.workers()))
            yield store
        finally:
            process.terminate()
            process.wait()


def _submit(store: Store, tenant: str, request: ImageRequest, count: int) -> str:
    submitted = store.submit(
        [replace(request, seed=seed) for seed in range(count)],
        tenant=tenant,
        priority=5,
        idempotency=None,
        metadata={},
        spec={},
        quota=10 * HEAVY,
        keep_seconds=600,
        max_attempts=3,
    )
    return submitted.job_id


def _timed(store: Store, tenant: str, request: ImageRequest) -> float:
    """Seconds from submitting LIGHT images to the last one's commit."""
    started = time.perf_counter()
    job = _submit(store, tenant, request, LIGHT)
    _until(lambda: store.job(job, None).state is State.SUCCEEDED)
    return time.perf_counter() - started


def _in_flight(store: Store) -> int:
    return sum(int(worker.info.get("in_flight", 0)) for worker in store.workers())


def _until(question: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not question():
        if time.monotonic() > deadline:
            raise TimeoutError("the worker did not get there")
        time.sleep(0.01)
