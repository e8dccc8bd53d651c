"""A service that listens on a real port, for streams and for real HTTP clients."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection

import uvicorn
from fastapi import FastAPI

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
