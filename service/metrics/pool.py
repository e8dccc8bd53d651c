"""The pool as Prometheus sees it: the queue, what it has counted, and every worker, at a scrape.

Workers have no port of their own: what they count travels in their registration
(`workers/metrics.py`), and what happens to leases is counted by the queue itself. Knows the store;
every service of a pool says the same here.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from jobs.errors import StorageUnavailable
from jobs.queue.decode import WorkerInfo
from jobs.queue.keys import WAITS_MS
from jobs.queue.store import Store

_TALLIES = {
    "lost": ("imagemill_leases_lost", "Images taken from a worker that let its lease run out."),
    "retried": ("imagemill_images_retried", "Images queued again after a failure."),
    "refused": ("imagemill_commits_refused", "Images made by a worker that had lost its lease."),
}
_OF_WORKERS = {
    "images_done": ("imagemill_worker_images", "Images that a worker delivered."),
    "steps": ("imagemill_worker_steps", "Denoising steps, a sample's each."),
    "tokens": ("imagemill_worker_tokens", "Image tokens denoised, rows counted, each step anew."),
    "busy_seconds": ("imagemill_worker_busy_seconds", "Seconds with a forward pass running."),
}
_HISTOGRAMS = {
    "forward_samples": ("imagemill_forward_samples", "Samples that shared a forward pass."),
    "forward_seconds": ("imagemill_forward_seconds", "Seconds of a forward pass."),
}
_LABELS = ("model", "worker")


class PoolCollector(Collector):
    """Reads queue, tallies and workers at each scrape."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        """Everything of the moment; only `imagemill_queue_up 0` while the queue is out of reach."""
        up = GaugeMetricFamily("imagemill_queue_up", "Whether the queue server answers.")
        try:
            depths, tallies = self._store.queue_depth(), self._store.tallies()
            workers = self._store.workers()
        except StorageUnavailable:
            up.add_metric((), 0)
            yield up
            return
        up.add_metric((), 1)
        yield up
        yield _depth(depths)
        yield _states(workers)
        yield _waits(tallies)
        for what, (name, about) in _TALLIES.items():
            yield _counter(name, about, tallies.get(what, {}))
        yield from _of_workers([one for one in workers if "model" in one.info])

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand: registering must not read the store."""
        return []


def _depth(depths: Mapping[str, Mapping[int, int]]) -> Metric:
    found = GaugeMetricFamily(
        "imagemill_queue_images", "Images that wait.", labels=("model", "priority")
    )
    for model, bands in depths.items():
        for priority, count in bands.items():
            found.add_metric((model, str(priority)), count)
    return found


def _states(workers: Sequence[WorkerInfo]) -> Metric:
    found = GaugeMetricFamily("imagemill_workers", "Workers by state.", labels=("model", "state"))
    keys = ((str(one.info.get("model")), str(one.info.get("state"))) for one in workers)
    for key, count in Counter(keys).items():
        found.add_metric(key, count)
    return found


def _waits(tallies: Mapping[str, Mapping[str, int]]) -> Metric:
    found = HistogramMetricFamily(
        "imagemill_wait_seconds", "From submission to an image's first claim.", labels=("model",)
    )
    for model, count in tallies.get("waits", {}).items():
        buckets = [
            (f"{bound / 1000:g}", float(tallies.get(f"wait_{bound}", {}).get(model, 0)))
            for bound in WAITS_MS
        ]
        waited = tallies.get("waited_ms", {}).get(model, 0) / 1000
        found.add_metric((model,), [*buckets, ("+Inf", float(count))], waited)
    return found


def _counter(name: str, about: str, by_model: Mapping[str, int]) -> Metric:
    found = CounterMetricFamily(name, about, labels=("model",))
    for model, count in by_model.items():
        found.add_metric((model,), count)
    return found


def _of_workers(workers: Sequence[WorkerInfo]) -> Iterator[Metric]:
    """What each worker said of itself; a worker that says less has fewer series."""
    flying = GaugeMetricFamily("imagemill_worker_in_flight", "Images held.", labels=_LABELS)
    cache = CounterMetricFamily(
        "imagemill_worker_prompts",
        "Prompts, by where their embedding came from.",
        labels=(*_LABELS, "result"),
    )
    memory = GaugeMetricFamily(
        "imagemill_worker_memory_bytes", "The device's memory.", labels=(*_LABELS, "kind")
    )
    for one in workers:
        labels, info = (str(one.info["model"]), one.id), one.info
        if "in_flight" in info:
            flying.add_metric(labels, info["in_flight"])
        for result, count in _table(info, "prompt_cache").items():
            cache.add_metric((*labels, result), count)
        for kind, size in _table(info, "memory").items():
            memory.add_metric((*labels, kind), size)
    yield from (flying, cache, memory)
    for field, (name, about) in _OF_WORKERS.items():
        counter = CounterMetricFamily(name, about, labels=_LABELS)
        for one in workers:
            if field in one.info:
                counter.add_metric((str(one.info["model"]), one.id), one.info[field])
        yield counter
    for field, (name, about) in _HISTOGRAMS.items():
        histogram = HistogramMetricFamily(name, about, labels=_LABELS)
        for one in workers:
            if found := _table(one.info, field):
                buckets = [(_bound(bound), float(count)) for bound, count in found["buckets"]]
                histogram.add_metric((str(one.info["model"]), one.id), buckets, found["sum"])
        yield histogram


def _table(info: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    found = info.get(field)
    return found if isinstance(found, dict) else {}


def _bound(bound: float | None) -> str:
    return "+Inf" if bound is None else f"{bound:g}"
