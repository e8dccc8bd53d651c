"""Puts the service together: routes, error handlers, metrics, the event reader's life.

    create_app(settings, store, images, catalog) -> FastAPI

Reads no environment and starts no server; `__main__` does.
"""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from jobs.catalog import Catalog
from jobs.errors import ImagemillError
from jobs.images import LocalImages
from jobs.store import Store
from service.errors import on_bad_parameters, on_fault, on_http_exception, on_our_error
from service.events import EventHub
from service.metrics import CountRequests, Metrics
from service.mill import Mill
from service.openapi import complete_document
from service.routes import events, health, images, jobs, models
from service.settings import ServiceSettings
from service.views import Links


def create_app(
    settings: ServiceSettings, store: Store, images: LocalImages, catalog: Catalog
) -> FastAPI:
    """The application. It follows the event stream between its lifespan's start and end."""
    app = FastAPI(
        title="imagemill",
        version=_version(),
        description="Batch image generation: prompts are queued, workers turn them into images.",
        lifespan=_lifespan,
        redirect_slashes=False,
    )
    parts = Mill(
        settings=settings,
        store=store,
        images=images,
        catalog=catalog,
        hub=EventHub(store),
        links=Links(settings.public_url or ""),
        started=int(time.time()),
    )
    _assemble(app, parts)
    return app


def _assemble(app: FastAPI, parts: Mill) -> None:
    app.state.mill = parts
    app.state.metrics = Metrics(parts.store, parts.hub)
    app.add_middleware(CountRequests, metrics=app.state.metrics)
    app.add_exception_handler(ImagemillError, on_our_error)
    app.add_exception_handler(RequestValidationError, on_bad_parameters)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(Exception, on_fault)
    for module in (jobs, events, images, models, health):
        app.include_router(module.router)
    _set_openapi(app, lambda: complete_document(app))


def _set_openapi(app: FastAPI, make: Callable[[], dict[str, object]]) -> None:
    app.openapi = make  # type: ignore[method-assign]


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    hub: EventHub = app.state.mill.hub
    hub.start()
    try:
        yield
    finally:
        await hub.stop()


def _version() -> str:
    try:
        return version("imagemill")
    except PackageNotFoundError:
        return "0"
