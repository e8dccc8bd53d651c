"""Prometheus metrics of the pool, read at each scrape: the queue, its counters, every worker.

Workers don't have their own port. They send their counters with their registration
(`workers/metrics.py`), and the queue itself counts what happens to leases. Reads the store, so all
services of a pool report the same values.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

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
from jobs.reports import Histogram, WorkerReport

_TALLIES = {
    "lost": ("imagemill_leases_lost", "Images taken from a worker whose lease expired."),
    "retried": ("imagemill_images_retried", "Images queued again after a failure."),
    "refused": ("imagemill_commits_refused", "Images finished by a worker without a valid lease."),
}
_Read = Callable[[WorkerReport], float | None]
_COUNTERS: tuple[tuple[str, str, _Read], ...] = (
    ("imagemill_worker_images", "Images delivered by a worker.", lambda r: r.images_done),
    ("imagemill_worker_steps", "Denoising steps, counted per sample.", lambda r: r.steps),
    (
        "imagemill_worker_tokens",
        "Image tokens denoised, counted per row and step.",
        lambda r: r.tokens,
    ),
    (
        "imagemill_worker_busy_seconds",
        "Seconds with a forward pass running.",
        lambda r: r.busy_seconds,
    ),
)
_HISTOGRAMS: tuple[tuple[str, str, Callable[[WorkerReport], Histogram | None]], ...] = (
    (
        "imagemill_forward_samples",
        "Samples that shared a forward pass.",
        lambda r: r.forward_samples,
    ),
    (
        "imagemill_forward_seconds",
        "Duration of a forward pass in seconds.",
        lambda r: r.forward_seconds,
    ),
)
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
        yield from _of_workers([worker for worker in workers if worker.report.model is not None])

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
    keys = ((str(worker.report.model), worker.report.state) for worker in workers)
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
    reports = [((str(worker.report.model), worker.id), worker.report) for worker in workers]
    for labels, report in reports:
        if report.in_flight is not None:
            in_flight.add_metric(labels, report.in_flight)
        for result, count in (report.prompt_cache or {}).items():
            cache.add_metric((*labels, result), count)
        for kind, size in (report.memory or {}).items():
            memory.add_metric((*labels, kind), size)
    yield from (in_flight, cache, memory)
    for name, about, read in _COUNTERS:
        counter = CounterMetricFamily(name, about, labels=_LABELS)
        for labels, report in reports:
            if (value := read(report)) is not None:
                counter.add_metric(labels, value)
        yield counter
    for name, about, read_histogram in _HISTOGRAMS:
        histogram = HistogramMetricFamily(name, about, labels=_LABELS)
        for labels, report in reports:
            if counts := read_histogram(report):
                buckets = [(_bound(bound), float(count)) for bound, count in counts.buckets]
                histogram.add_metric(labels, buckets, counts.sum)
        yield histogram


def _bound(bound: float | None) -> str:
    return "+Inf" if bound is None else f"{bound:g}"
