"""Prometheus metrics of this process: requests, image outcomes, webhooks.

They count from the start of this process. The state of the queue and the workers is read at each
scrape (`service/metrics/pool.py`). Each application has its own registry, so several of them can
run in one process.
"""

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Gauge, Histogram
from prometheus_client import Counter as PrometheusCounter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.queue.decode import Event
from jobs.queue.store import Store
from service.metrics.pool import PoolCollector
from service.read.events import EventHub


class Metrics:
    """The registry, and this process's own metrics."""

    def __init__(self, store: Store, hub: EventHub) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(PoolCollector(store))
        self.requests = PrometheusCounter(
            "imagemill_http_requests",
            "HTTP requests handled.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "imagemill_http_request_seconds",
            "Time until the whole response was sent, including long polls.",
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
        self.webhooks = PrometheusCounter(
            "imagemill_webhook_posts",
            "Attempts to deliver a webhook, by outcome.",
            ("outcome",),
            registry=self.registry,
        )
        self.webhooks_waiting = Gauge(
            "imagemill_webhooks_waiting",
            "Webhooks that this process has yet to deliver.",
            registry=self.registry,
        )
        Gauge(
            "imagemill_waits",
            "Jobs with a waiting request.",
            registry=self.registry,
        ).set_function(lambda: len(hub.watched))
        hub.listen(self.count_events)

    def count_events(self, events: Sequence[Event]) -> None:
        """Count the image outcomes among `events`."""
        for event in events:
            if event.type in _OUTCOMES:
                self.images.labels(_OUTCOMES[event.type]).inc()

    def count_webhook(self, outcome: str) -> None:
        """Count an attempt by outcome: `heard`, `again` or `given_up`."""
        self.webhooks.labels(outcome).inc()


class CountRequests:
    """Middleware that counts and times requests by route rather than path."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and count its response."""
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
