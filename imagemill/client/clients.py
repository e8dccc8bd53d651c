"""The Python client: `Client` for blocking code, `AsyncClient` for asyncio.

    with Client("http://127.0.0.1:8000") as client:
        job = client.submit("demo", ["a large red circle", "a blue heart"], steps=8)
        job.wait().save("out")

This module only sends requests, blocking or awaited. `protocol.py` defines the requests, and
`jobs.py` what can be done with a job.
"""

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, TypeVar, Unpack

import httpx

from imagemill.client import protocol
from imagemill.client.errors import ApiError, InvalidInput
from imagemill.client.fields import JobFields
from imagemill.client.jobs import AsyncJob, Job
from imagemill.client.models import Image, Model, Progress, Worker
from jobs.job import State

T = TypeVar("T")

DEFAULT_SERVER = "http://127.0.0.1:8000"
PAGE = 100
"""Jobs per page that `jobs` requests."""

LONGEST_SILENCE = 45.0
"""Seconds of silence after which a stream counts as dead: three of the server's heartbeats."""

Prompts = str | Mapping[str, Any] | Iterable[str | Mapping[str, Any]]


def _http_settings(server: str | None, api_key: str | None) -> dict[str, Any]:
    """Arguments for both kinds of httpx client; defaults come from the environment."""
    address = server or os.environ.get("IMAGEMILL_SERVER") or DEFAULT_SERVER
    try:
        url = httpx.URL(address)
        url.host.encode("idna")  # the name lookup does the same, but fails with an obscure error
    except (httpx.InvalidURL, UnicodeError):
        url = httpx.URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise InvalidInput(
            f"invalid server address {address!r}: expected a URL such as {DEFAULT_SERVER}"
        )
    key = api_key or os.environ.get("IMAGEMILL_API_KEY")
    if key and not protocol.VISIBLE.fullmatch(key):
        raise InvalidInput(
            "invalid API key (IMAGEMILL_API_KEY): it must be 1 to 255 visible ASCII characters"
        )
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # Never connect to a local server through the environment's proxy.
    local = url.host in ("127.0.0.1", "localhost", "::1")
    return {
        "base_url": url,
        "headers": headers | {"User-Agent": "imagemill-client"},
        "trust_env": not local,
        "timeout": httpx.Timeout(30, connect=5),
    }


@contextmanager
def _usable_proxy() -> Iterator[None]:
    """Raise InvalidInput if the environment names a proxy that httpx can't use."""
    try:
        yield
    except (httpx.InvalidURL, ImportError, ValueError) as error:
        raise InvalidInput(f"invalid proxy settings in the environment: {error}") from error


def _request(call: protocol.Call) -> dict[str, Any]:
    """A call as arguments for httpx's `request`."""
    return {
        "method": call.method,
        "url": call.path,
        "json": call.body,
        "headers": dict(call.headers),
        "params": dict(call.params) or None,
        "timeout": httpx.Timeout(call.read_timeout, connect=5),
    }


class Client:
    """A connection to a server, for blocking code. Can be shared between threads.

    `server` and `api_key` default to IMAGEMILL_SERVER and IMAGEMILL_API_KEY. `patience` limits how
    many seconds a call may spend waiting between retries (after connection errors, 429, 502 and
    503). `pause` does the waiting; an exception that it raises ends the call.
    """

    def __init__(
        self,
        server: str | None = None,
        *,
        api_key: str | None = None,
        patience: float = 30,
        pause: Callable[[float], None] = time.sleep,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.patience = patience
        self._pause = pause
        settings = _http_settings(server, api_key)
        with _usable_proxy():
            self._http = httpx.Client(transport=transport, **settings)

    @property
    def server(self) -> str:
        """The server's address."""
        return str(self._http.base_url).rstrip("/")

    def submit(
        self,
        model: str,
        prompts: Prompts,
        *,
        idempotency_key: str | None = None,
        **fields: Unpack[JobFields],
    ) -> Job:
        """Queue a batch and return immediately.

        `fields` are the job's own fields and the defaults for all prompts; see `JobFields`. Retries
        never create a second job.
        """
        key = idempotency_key or str(uuid.uuid4())
        return Job(self, self.say(protocol.submit(model, prompts, fields, key, self.patience)))

    def job(self, job_id: str) -> Job:
        """Get a job by its id; raises ApiError 404 if it doesn't exist."""
        return Job(self, self.say(protocol.fetch(protocol.job_path(job_id), self.patience)))

    def jobs(self, state: State | None = None) -> Iterator[Job]:
        """The caller's jobs, newest first, fetched page by page.

        They come without images; `refresh()` a job to get them.
        """
        cursor: str | None = None
        while True:
            page = self.get("/v1/jobs", state=state, cursor=cursor, limit=PAGE)
            for raw in page["data"]:
                yield Job(self, raw)
            cursor = page["next"]
            if cursor is None:
                return

    def models(self) -> list[Model]:
        """The server's models, in the order of its catalog."""
        return [Model.parse(raw) for raw in self.get("/v1/models")["data"]]

    def workers(self) -> list[Worker]:
        """The server's workers."""
        return [Worker.parse(raw) for raw in self.get("/v1/workers")["data"]]

    def get(self, path: str, **params: Any) -> dict[str, Any]:
        """Get any other JSON resource by its path."""
        return self.say(protocol.fetch(path, self.patience, **params))

    def say(self, talk: protocol.Conversation[T]) -> T:
        """Carry out a conversation of `protocol.py` and return its result."""
        try:
            step = next(talk)
            while True:
                if isinstance(step, protocol.Pause):
                    self._pause(step.seconds)
                    step = talk.send(None)
                    continue
                try:
                    response = self._http.request(**_request(step))
                except httpx.TransportError as error:
                    step = talk.throw(error)
                else:
                    step = talk.send(response)
        except StopIteration as end:
            result: T = end.value
            return result

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def stream_lines(
    client: Client, path: str, headers: Mapping[str, str]
) -> Iterator[Iterator[str] | None]:
    """The lines of an event stream as they arrive, or None if there is no stream (204).

    Never retries: raises ApiError, or httpx's errors if the connection breaks.
    """
    timeout = httpx.Timeout(LONGEST_SILENCE, connect=5)
    with client._http.stream("GET", path, headers=headers, timeout=timeout) as response:
        if response.status_code >= 400:
            response.read()
            raise protocol.api_error(response)
        yield None if response.status_code == 204 else protocol.lines(response.iter_text())


class AsyncClient:
    """`Client` for asyncio: the same methods, awaited."""

    def __init__(
        self,
        server: str | None = None,
        *,
        api_key: str | None = None,
        patience: float = 30,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.patience = patience
        self._pause = pause
        settings = _http_settings(server, api_key)
        with _usable_proxy():
            self._http = httpx.AsyncClient(transport=transport, **settings)

    @property
    def server(self) -> str:
        """The server's address."""
        return str(self._http.base_url).rstrip("/")

    async def submit(
        self,
        model: str,
        prompts: Prompts,
        *,
        idempotency_key: str | None = None,
        **fields: Unpack[JobFields],
    ) -> AsyncJob:
        """Queue a batch and return immediately, like `Client.submit`."""
        key = idempotency_key or str(uuid.uuid4())
        talk = protocol.submit(model, prompts, fields, key, self.patience)
        return AsyncJob(self, await self.say(talk))

    async def job(self, job_id: str) -> AsyncJob:
        """Get a job by its id; raises ApiError 404 if it doesn't exist."""
        return AsyncJob(
            self, await self.say(protocol.fetch(protocol.job_path(job_id), self.patience))
        )

    async def jobs(self, state: State | None = None) -> AsyncIterator[AsyncJob]:
        """The caller's jobs, newest first, fetched page by page.

        They come without images; `refresh()` a job to get them.
        """
        cursor: str | None = None
        while True:
            page = await self.get("/v1/jobs", state=state, cursor=cursor, limit=PAGE)
            for raw in page["data"]:
                yield AsyncJob(self, raw)
            cursor = page["next"]
            if cursor is None:
                return

    async def models(self) -> list[Model]:
        """The server's models, in the order of its catalog."""
        return [Model.parse(raw) for raw in (await self.get("/v1/models"))["data"]]

    async def workers(self) -> list[Worker]:
        """The server's workers."""
        return [Worker.parse(raw) for raw in (await self.get("/v1/workers"))["data"]]

    async def get(self, path: str, **params: Any) -> dict[str, Any]:
        """Get any other JSON resource by its path."""
        return await self.say(protocol.fetch(path, self.patience, **params))

    async def say(self, talk: protocol.Conversation[T]) -> T:
        """Carry out a conversation of `protocol.py` and return its result."""
        try:
            step = next(talk)
            while True:
                if isinstance(step, protocol.Pause):
                    await self._pause(step.seconds)
                    step = talk.send(None)
                    continue
                try:
                    response = await self._http.request(**_request(step))
                except httpx.TransportError as error:
                    step = talk.throw(error)
                else:
                    step = talk.send(response)
        except StopIteration as end:
            result: T = end.value
            return result

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


__all__ = [
    "ApiError",
    "AsyncClient",
    "AsyncJob",
    "Client",
    "Image",
    "Job",
    "Model",
    "Progress",
    "Worker",
]
