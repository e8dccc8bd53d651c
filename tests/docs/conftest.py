"""The application without a queue, for its routes and metrics."""

from pathlib import Path
from typing import Any, cast

import pytest
from fastapi import FastAPI

from jobs.catalog import load_catalog
from jobs.image_store import LocalImages
from jobs.queue.store import Store
from service.app import create_app
from service.settings import ServiceSettings
from tests.docs.pages import ROOT


class NoQueue:
    """The parts of a store that a scrape needs."""

    def queue_depth(self) -> dict[str, dict[int, int]]:
        return {}

    def tallies(self) -> dict[str, dict[str, int]]:
        return {}

    def workers(self) -> list[Any]:
        return []


@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    folder: Path = tmp_path_factory.mktemp("docs")
    settings = ServiceSettings.read(data=folder)
    catalog = load_catalog(ROOT / "models.toml")
    store = cast(Store, NoQueue())
    return create_app(settings, store, LocalImages(folder / "images"), catalog)


@pytest.fixture(scope="session")
def routes(app: FastAPI) -> set[str]:
    """Every documented route, such as `GET /path`."""
    paths = app.openapi()["paths"]
    return {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}


@pytest.fixture(scope="session")
def metrics(app: FastAPI) -> set[str]:
    """The names of all series that `/metrics` exports."""
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""]}
    collected = app.state.metrics.registry.collect()
    return {metric.name + suffix for metric in collected for suffix in suffixes[metric.type]}
