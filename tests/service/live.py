"""A service that listens on a real port, for streams and for real HTTP clients."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import openai
import uvicorn
from fastapi import FastAPI

from jobs.runtime.embedded_queue import EmbeddedServer
from tests import web
from tests.service.conftest import Deployment, deployed
from tests.waiting import PATIENCE, wait_until


@contextmanager
def leaving(address: str, path: str, body: dict[str, object], **headers: str) -> Iterator[None]:
    """A caller who posts `body` to `address`, and disconnects without reading the response."""
    connection = HTTPConnection(address.removeprefix("http://"), timeout=PATIENCE)
    headers = {"Content-Type": "application/json", **headers}
    connection.request("POST", path, json.dumps(body), headers)
    yield
    connection.close()


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """Serve `app` on a thread until the context exits; yields its address."""
    config = uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        app.state.context.hub.close()
        server.should_exit = True
        thread.join()


@contextmanager
def batch_service(
    server: EmbeddedServer, folder: Path
) -> Iterator[tuple[Deployment, openai.OpenAI]]:
    """A service with small limits that listens on a port, and OpenAI's client for it."""
    with (
        deployed(
            server.url, folder, start=False, max_file_bytes=100_000, max_unfinished=150
        ) as service,
        listening(service.client.app) as address,
        web.Client(base_url=address, timeout=PATIENCE) as client,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=PATIENCE) as theirs,
    ):
        service.client = client
        yield service, theirs
