"""Whether a first start on a busy machine has lasting costs: two fresh folders, one under load.

A worker of the bundled model starts in each folder, one of them with busy loops next to it, and
makes 200 images, half of them fast and half reproducible. After that, both should use the same
buckets.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench import serving
from bench.report import Metrics
from jobs.catalog import load_catalog
from jobs.queue.store import Store
from jobs.reports import Buckets
from workers.pass_timer import probe

CATALOG = Path("models.toml")

LOOPS, IMAGES, AT_ONCE = 4, 200, 40
LOOP = "while True: pass"


def run() -> Metrics:
    """Print both workers' buckets before and after; a figure is 1 if they agree after."""
    rows = {"quiet": _buckets(loops=0), "busy": _buckets(loops=LOOPS)}
    print(f"\nbuckets at the default size, before and after {IMAGES} images")
    for name, (before, after) in rows.items():
        print(f"  {name:<10}{before}   {after}")
    quiet, busy = (after for _, after in rows.values())
    return {
        "converged_pinned": float(quiet.pinned == busy.pinned),
        "converged_largest": float(quiet.largest == busy.largest),
    }


def _buckets(loops: int) -> tuple[Buckets, Buckets]:
    """The buckets after a start next to `loops` busy loops, and after the images without them."""
    with serving.folder() as data:
        with _busy(loops), serving.workers(data, CATALOG, "demo") as store:
            before = _reported(store)
        with serving.workers(data, CATALOG, "demo") as store:
            _make(store)
            return before, _reported(store)


def _make(store: Store) -> None:
    model = load_catalog(CATALOG).get("demo")
    request = replace(probe(model), steps=model.defaults.steps)
    workload = [replace(request, seed=n, reproducible=n % 2 == 0) for n in range(IMAGES)]
    for first in range(0, IMAGES, AT_ONCE):
        submitted = store.submit(
            workload[first : first + AT_ONCE],
            tenant="bench",
            priority=5,
            metadata={},
            spec={},
            quota=IMAGES,
            keep_seconds=600,
            max_attempts=3,
        )
        serving.until(partial(_is_finished, store, submitted.job_id))


def _is_finished(store: Store, job_id: str) -> bool:
    return store.job(job_id, None).state.finished


def _reported(store: Store) -> Buckets:
    def buckets() -> Buckets | None:
        reports = (worker.report for worker in store.workers())
        return next((report.buckets for report in reports if report.buckets), None)

    return serving.until(buckets)


@contextmanager
def _busy(loops: int) -> Iterator[None]:
    """Run `loops` processes in busy loops until the end of the block."""
    processes = [subprocess.Popen([sys.executable, "-c", LOOP]) for _ in range(loops)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
