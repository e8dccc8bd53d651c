"""Creates the application: routes, error handlers, metrics, the lifespan of the event reader.

    create_app(settings, store, images, catalog) -> FastAPI

Doesn't read the environment or start a server; `__main__` does that.
"""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import anyio.to_thread
from fastapi import Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware

from jobs.catalog import Catalog
from jobs.image_store import LocalImages
from jobs.queue.store import Store
from service.context import ServiceContext
from service.documents import Documents
from service.http import exception_handlers
from service.http.auth import Gate, caller, caller_by_password
from service.http.compression import CompressText
from service.http.for_generators import operation_id
from service.http.openapi import complete_document, openai_errors, problems
from service.http.request_id import NameRequests
from service.http.signed_urls import UrlSigner, viewer
from service.kept_secret import kept_secret
from service.keys import KeyRing
from service.metrics.requests import CountRequests, Metrics
from service.openai import batch_routes, file_routes, health_routes, image_routes
from service.openai.files import FileStore
from service.read.events import EventHub
from service.read.views import Links
from service.read.worker_cache import RecentCards, RecentWorkers
from service.routes import docs, events, health, images, jobs, models, page
from service.sdapi import list_routes, option_routes, progress_routes, routes
from service.sdapi.sessions import Sessions
from service.settings import ServiceSettings
from service.submit.prompt_length import PromptLengths
from service.webhooks.notices import Notices
from service.webhooks.outbox import Outbox
from service.webhooks.sender import WebhookSender

_ROUTES = (
    image_routes,
    jobs,
    events,
    images,
    routes,
    progress_routes,
    option_routes,
    models,
    file_routes,
    batch_routes,
    list_routes,
)
"""In the order in which a request's path is matched, so the busiest come first."""

_EXPOSED = ("ETag", "Location", "Retry-After", "X-Request-ID", "Content-Range")
"""Response headers that pages of allowed other sites can read."""

_A1111_ROUTES = (routes, progress_routes, option_routes, list_routes)

_GUARDS: dict[ModuleType, Callable[..., Any]] = {
    images: viewer,
    **dict.fromkeys(_A1111_ROUTES, caller_by_password),
}
"""Who may call a module's routes, if it isn't `caller`."""

_OPENAI_ROUTES = (image_routes, file_routes, batch_routes)


def create_app(
    settings: ServiceSettings, store: Store, images: LocalImages, catalog: Catalog
) -> FastAPI:
    """The application. It follows the event stream during its lifespan."""
    app = FastAPI(
        title="imagemill",
        version=_version(),
        description="Batch image generation: prompts are queued, workers turn them into images.",
        lifespan=_lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=operation_id,
    )
    gate = Gate(KeyRing(settings.data / "keys.json"), may_be_open=settings.may_be_open)
    signer = UrlSigner(gate, partial(_url_secret, settings), settings.url_seconds)
    parts = ServiceContext(
        settings=settings,
        store=store,
        images=images,
        catalog=catalog,
        hub=EventHub(store),
        files=FileStore(settings.data / "files"),
        batches=Documents(settings.data / "batches", "batch_"),
        links=Links(settings.public_url or "", signer.sign),
        lengths=PromptLengths(settings.tokenizer_file),
        workers=RecentWorkers(store),
        cards=RecentCards(store),
        gate=gate,
        signer=signer,
        sessions=Sessions(settings.data / "sdapi"),
        started=int(time.time()),
    )
    _assemble(app, parts)
    return app


def _assemble(app: FastAPI, parts: ServiceContext) -> None:
    app.state.context = parts
    app.state.metrics = Metrics(parts.store, parts.hub)
    app.add_middleware(CompressText)
    if parts.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=parts.settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
        )
    app.add_middleware(CountRequests, metrics=app.state.metrics)
    app.add_middleware(NameRequests)
    exception_handlers.install(app)
    for module in _ROUTES:
        failures = problems(401, 403, 429)
        if module in _OPENAI_ROUTES:
            failures = openai_errors(401, 403, 429)
        guard = Depends(_GUARDS.get(module, caller))
        app.include_router(module.router, dependencies=[guard], responses=failures)
    app.include_router(health.router)
    app.include_router(health_routes.router)
    app.include_router(docs.router)
    app.include_router(page.router)
    _set_openapi(app, lambda: complete_document(app))


def _url_secret(settings: ServiceSettings) -> str:
    secret = settings.url_secret
    return secret.get_secret_value() if secret else kept_secret(settings.data / "urls", "")


def _set_openapi(app: FastAPI, make: Callable[[], dict[str, object]]) -> None:
    app.openapi = make  # type: ignore[method-assign]


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    parts: ServiceContext = app.state.context
    parts.hub.start()
    sender = _webhooks(parts, app.state.metrics)
    sender.start()
    try:
        yield
    finally:
        await parts.hub.stop()
        await anyio.to_thread.run_sync(sender.stop)


def _webhooks(parts: ServiceContext, metrics: Metrics) -> WebhookSender:
    root, secret = parts.settings.data / "webhooks", parts.settings.webhook_secret
    sender = WebhookSender(
        parts.store,
        Outbox(root),
        Notices(parts.store, parts.links),
        secret.get_secret_value() if secret else kept_secret(root),
        private=lambda: parts.allows_private_webhooks,
        count=metrics.count_webhook,
    )
    metrics.webhooks_waiting.set_function(lambda: sender.waiting)
    return sender


def _version() -> str:
    try:
        return version("imagemill")
    except PackageNotFoundError:
        return "0"
