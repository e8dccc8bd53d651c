"""Counters and gauges for Prometheus: requests as they pass, the queue when it is scraped.

Image outcomes are counted from the event stream since this process started. One registry an
application, so that several can live in one process.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Gauge, Histogram
from prometheus_client import Counter as PrometheusCounter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.errors import StorageUnavailable
from jobs.store import Store
from jobs.views import Event
from service.events import EventHub


class QueueCollector(Collector):
    """Reads the queue's depth and the workers' states at each scrape."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        """Gauges of the moment; only `imagemill_queue_up 0` while the queue is out of reach."""
        up = GaugeMetricFamily("imagemill_queue_up", "Whether the queue server answers.")
        depth = GaugeMetricFamily(
            "imagemill_queue_images", "Images that wait.", labels=("model", "priority")
        )
        states = GaugeMetricFamily(
            "imagemill_workers", "Workers by state.", labels=("model", "state")
        )
        try:
            for model, bands in self._store.queue_depth().items():
                for priority, count in bands.items():
                    depth.add_metric((model, str(priority)), count)
            workers = self._store.workers()
        except StorageUnavailable:
            up.add_metric((), 0)
            return iter([up])
        up.add_metric((), 1)
        keys = ((str(one.info.get("model")), str(one.info.get("state"))) for one in workers)
        for key, count in Counter(keys).items():
            states.add_metric(key, count)
        return iter([up, depth, states])

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand: registering must not read the store."""
        return []


class Metrics:
    """The registry, and the counters that this process keeps."""

    def __init__(self, store: Store, hub: EventHub) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(QueueCollector(store))
        self.requests = PrometheusCounter(
            "imagemill_http_requests",
            "HTTP requests answered.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "imagemill_http_request_seconds",
            "Until the whole answer was sent; long-polls included.",
            ("method", "route"),
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=self.registry,
        )
        self.images = PrometheusCounter(
            "imagemill_images_finished",
            "Images finished since this process started, by their final state.",
            ("state",),
            registry=self.registry,
        )

        Gauge(
            "imagemill_waits",
            "Jobs that requests wait for.",
            registry=self.registry,
        ).set_function(lambda: len(hub.watched))
        hub.listen(self.count_events)

    def count_events(self, events: Sequence[Event]) -> None:
        """Count the image outcomes among `events`."""
        for event in events:
            if event.type in _OUTCOMES:
                self.images.labels(_OUTCOMES[event.type]).inc()


class CountRequests:
    """Middleware that counts and times every request by its route, not by its path."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and count its answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def counting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, counting_send)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.requests.labels(method, route, str(status)).inc()
            self._metrics.seconds.labels(method, route).observe(time.perf_counter() - began)


_OUTCOMES = {"image": "succeeded", "image_failed": "failed"}
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
