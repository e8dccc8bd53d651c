"""Prometheus metrics of the pool, read at each scrape: the queue, its counters, every worker.

Workers don't have their own port. They send their counters with their registration
(`workers/metrics.py`), and the queue itself counts what happens to leases. Reads the store, so all
services of a pool report the same values.
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
    "lost": ("imagemill_leases_lost", "Images taken from a worker whose lease expired."),
    "retried": ("imagemill_images_retried", "Images queued again after a failure."),
    "refused": ("imagemill_commits_refused", "Images finished by a worker without a valid lease."),
}
_OF_WORKERS = {
    "images_done": ("imagemill_worker_images", "Images delivered by a worker."),
    "steps": ("imagemill_worker_steps", "Denoising steps, counted per sample."),
    "tokens": ("imagemill_worker_tokens", "Image tokens denoised, counted per row and step."),
    "busy_seconds": ("imagemill_worker_busy_seconds", "Seconds with a forward pass running."),
}
_HISTOGRAMS = {
    "forward_samples": ("imagemill_forward_samples", "Samples that shared a forward pass."),
    "forward_seconds": ("imagemill_forward_seconds", "Duration of a forward pass in seconds."),
}
_LABELS = ("model", "worker")


class PoolCollector(Collector):
    """Reads the queue, its counters and the workers at each scrape."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        """All current metrics; only `imagemill_queue_up 0` if the queue is unreachable."""
        up = GaugeMetricFamily("imagemill_queue_up", "Whether the queue server is reachable.")
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
        for tally, (name, about) in _TALLIES.items():
            yield _counter(name, about, tallies.get(tally, {}))
        yield from _of_workers([worker for worker in workers if "model" in worker.info])

    def describe(self) -> Iterable[Metric]:
        """Nothing, because registering must not read the store."""
        return []


def _depth(depths: Mapping[str, Mapping[int, int]]) -> Metric:
    gauge = GaugeMetricFamily(
        "imagemill_queue_images", "Queued images.", labels=("model", "priority")
    )
    for model, bands in depths.items():
        for priority, count in bands.items():
            gauge.add_metric((model, str(priority)), count)
    return gauge


def _states(workers: Sequence[WorkerInfo]) -> Metric:
    gauge = GaugeMetricFamily("imagemill_workers", "Workers by state.", labels=("model", "state"))
    keys = ((str(worker.info.get("model")), str(worker.info.get("state"))) for worker in workers)
    for key, count in Counter(keys).items():
        gauge.add_metric(key, count)
    return gauge


def _waits(tallies: Mapping[str, Mapping[str, int]]) -> Metric:
    histogram = HistogramMetricFamily(
        "imagemill_wait_seconds", "From submission to an image's first claim.", labels=("model",)
    )
    for model, count in tallies.get("waits", {}).items():
        buckets = [
            (f"{bound / 1000:g}", float(tallies.get(f"wait_{bound}", {}).get(model, 0)))
            for bound in WAITS_MS
        ]
        waited = tallies.get("waited_ms", {}).get(model, 0) / 1000
        histogram.add_metric((model,), [*buckets, ("+Inf", float(count))], waited)
    return histogram


def _counter(name: str, about: str, by_model: Mapping[str, int]) -> Metric:
    counter = CounterMetricFamily(name, about, labels=("model",))
    for model, count in by_model.items():
        counter.add_metric((model,), count)
    return counter


def _of_workers(workers: Sequence[WorkerInfo]) -> Iterator[Metric]:
    """Each worker's own metrics; a worker that reports fewer values has fewer series."""
    in_flight = GaugeMetricFamily(
        "imagemill_worker_in_flight", "Images held by a worker.", labels=_LABELS
    )
    cache = CounterMetricFamily(
        "imagemill_worker_prompts",
        "Prompts, by the source of their embedding.",
        labels=(*_LABELS, "result"),
    )
    memory = GaugeMetricFamily(
        "imagemill_worker_memory_bytes", "Memory of the device.", labels=(*_LABELS, "kind")
    )
    for worker in workers:
        labels, info = (str(worker.info["model"]), worker.id), worker.info
        if "in_flight" in info:
            in_flight.add_metric(labels, info["in_flight"])
        for result, count in _table(info, "prompt_cache").items():
            cache.add_metric((*labels, result), count)
        for kind, size in _table(info, "memory").items():
            memory.add_metric((*labels, kind), size)
    yield from (in_flight, cache, memory)
    for field, (name, about) in _OF_WORKERS.items():
        counter = CounterMetricFamily(name, about, labels=_LABELS)
        for worker in workers:
            if field in worker.info:
                counter.add_metric((str(worker.info["model"]), worker.id), worker.info[field])
        yield counter
    for field, (name, about) in _HISTOGRAMS.items():
        histogram = HistogramMetricFamily(name, about, labels=_LABELS)
        for worker in workers:
            if table := _table(worker.info, field):
                buckets = [(_bound(bound), float(count)) for bound, count in table["buckets"]]
                histogram.add_metric((str(worker.info["model"]), worker.id), buckets, table["sum"])
        yield histogram


def _table(info: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    table = info.get(field)
    return table if isinstance(table, dict) else {}


def _bound(bound: float | None) -> str:
    return "+Inf" if bound is None else f"{bound:g}"
