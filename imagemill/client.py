"""The Python client: `Client` for plain code, `AsyncClient` for asyncio, and their `Job` handles.

    with Client("http://127.0.0.1:8000") as client:
        job = client.submit("demo", ["a large red circle", "a blue heart"], steps=8)
        job.wait().save("out")

Only the driving of a conversation is here, blocking or awaited; what is said is in `wire.py`.
"""

import asyncio
import os
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx

from imagemill import wire
from imagemill.errors import ApiError, InvalidInput
from jobs.errors import NotFound
from jobs.job import Counts, State

T = TypeVar("T")

DEFAULT_SERVER = "http://127.0.0.1:8000"
FOREVER = 10 * 365 * 86400.0
LONGEST_SILENCE = 45.0
"""Seconds without a line after which a stream is dead: three of the server's heartbeats."""

Prompts = str | Mapping[str, Any] | Iterable[str | Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Image:
    """One image of a job as the server last told it; `step` of `steps` is measured, not guessed."""

    index: int
    prompt: str
    seed: int
    state: State
    step: int
    steps: int
    sha256: str | None
    error: str | None

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Self:
        """An entry of a job's `images`."""
        return cls(
            index=raw["index"],
            prompt=raw["prompt"],
            seed=raw["seed"],
            state=State(raw["state"]),
            step=raw["step"],
            steps=raw["steps"],
            sha256=raw.get("sha256"),
            error=raw.get("error"),
        )


class _Snapshot:
    """A job as the server last told it, as plain values; `raw` is the whole answer."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.state} {self.progress:.0%}>"

    @property
    def id(self) -> str:
        """The job's name on the server."""
        return str(self.raw["id"])

    @property
    def state(self) -> State:
        """The job's state at the last refresh."""
        return State(self.raw["state"])

    @property
    def counts(self) -> Counts:
        """How many images are in each state."""
        return Counts(**{name: int(self.raw["counts"][name]) for name in Counts.__slots__})

    @property
    def progress(self) -> float:
        """The share of all denoising steps that are done, 0..1."""
        return float(self.raw["progress"])

    def images(self) -> list[Image]:
        """Every image of the job, finished or not, in order."""
        return [Image.parse(raw) for raw in self.raw["images"]]

    def _finished_image(self, index: int) -> Image:
        image = self.images()[index]
        if image.sha256 is None:
            raise NotFound(f"image {index} of job {self.id} is {image.state}")
        return image


class Job(_Snapshot):
    """A job on the server; every method but `images` talks to it, and those return fresh news."""

    def __init__(self, client: "Client", raw: dict[str, Any]) -> None:
        super().__init__(raw)
        self._client = client

    def refresh(self) -> Self:
        """Ask how the job is now."""
        self.raw = self._client.say(wire.fetch(f"/v1/jobs/{self.id}", self._client.patience))
        return self

    def wait(self, timeout: float | None = None) -> Self:
        """Block until the job has ended, well or not; raises TimeoutError after `timeout` s."""
        limit = FOREVER if timeout is None else timeout
        self.raw = self._client.say(wire.until_finished(self.id, limit, self._client.patience))
        return self

    def download(self, index: int) -> bytes:
        """A finished image's bytes, its checksum verified; raises NotFound before it is made."""
        sha256 = str(self._finished_image(index).sha256)
        return self._client.say(wire.download(self.id, index, sha256, self._client.patience))

    def save(self, folder: str | Path) -> list[Path]:
        """Put every finished image into `folder`, skipping those that are there; their paths."""
        return self._client.say(wire.save(self.raw, Path(folder), self._client.patience))

    def cancel(self) -> Self:
        """Stop what has not finished; what has stays."""
        self.raw = self._client.say(wire.act(self.id, "cancel", self._client.patience))
        return self

    def retry(self) -> Self:
        """Make again what failed or was cancelled, and only that."""
        self.raw = self._client.say(wire.act(self.id, "retry", self._client.patience))
        return self

    def delete(self) -> None:
        """Remove the job and its files from the server."""
        self._client.say(wire.remove(self.id, self._client.patience))


class AsyncJob(_Snapshot):
    """`Job` for asyncio: the same methods, awaited."""

    def __init__(self, client: "AsyncClient", raw: dict[str, Any]) -> None:
        super().__init__(raw)
        self._client = client

    async def refresh(self) -> Self:
        """Ask how the job is now."""
        self.raw = await self._client.say(wire.fetch(f"/v1/jobs/{self.id}", self._client.patience))
        return self

    async def wait(self, timeout: float | None = None) -> Self:
        """Return once the job has ended, well or not; raises TimeoutError after `timeout` s."""
        limit = FOREVER if timeout is None else timeout
        talk = wire.until_finished(self.id, limit, self._client.patience)
        self.raw = await self._client.say(talk)
        return self

    async def download(self, index: int) -> bytes:
        """A finished image's bytes, its checksum verified; raises NotFound before it is made."""
        sha256 = str(self._finished_image(index).sha256)
        return await self._client.say(wire.download(self.id, index, sha256, self._client.patience))

    async def save(self, folder: str | Path) -> list[Path]:
        """Put every finished image into `folder`, skipping those that are there; their paths."""
        return await self._client.say(wire.save(self.raw, Path(folder), self._client.patience))

    async def cancel(self) -> Self:
        """Stop what has not finished; what has stays."""
        self.raw = await self._client.say(wire.act(self.id, "cancel", self._client.patience))
        return self

    async def retry(self) -> Self:
        """Make again what failed or was cancelled, and only that."""
        self.raw = await self._client.say(wire.act(self.id, "retry", self._client.patience))
        return self

    async def delete(self) -> None:
        """Remove the job and its files from the server."""
        await self._client.say(wire.remove(self.id, self._client.patience))


def _http_settings(server: str | None, api_key: str | None) -> dict[str, Any]:
    """What both kinds of httpx client are made from; the environment fills what is not given."""
    given = server or os.environ.get("IMAGEMILL_SERVER") or DEFAULT_SERVER
    try:
        url = httpx.URL(given)
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise InvalidInput(f"{given!r} is no server's address, such as {DEFAULT_SERVER}")
    key = api_key or os.environ.get("IMAGEMILL_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # A local server is never meant to be reached through the environment's proxy.
    local = url.host in ("127.0.0.1", "localhost", "::1")
    return {
        "base_url": url,
        "headers": headers | {"User-Agent": "imagemill-client"},
        "trust_env": not local,
        "timeout": httpx.Timeout(30, connect=5),
    }


def _request(call: wire.Call) -> dict[str, Any]:
    """A call as arguments of httpx's `request`."""
    return {
        "method": call.method,
        "url": call.path,
        "json": call.body,
        "headers": dict(call.headers),
        "params": dict(call.params) or None,
        "timeout": httpx.Timeout(call.read_timeout, connect=5),
    }


class Client:
    """A server, for plain code. Safe to share between threads.

    `server` and `api_key` default to IMAGEMILL_SERVER and IMAGEMILL_API_KEY. `patience` is how
    many seconds of waiting a call may spend on retries (connection errors, 429, 502, 503), and
    `pause` does the waiting; what it raises ends the call.
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
        self._http = httpx.Client(transport=transport, **_http_settings(server, api_key))

    @property
    def server(self) -> str:
        """The server's address."""
        return str(self._http.base_url).rstrip("/")

    def submit(
        self, model: str, prompts: Prompts, *, idempotency_key: str | None = None, **fields: Any
    ) -> Job:
        """Queue a batch and return at once. `fields` are defaults for all prompts, and the job's
        own: negative_prompt, seed, width, height, steps, guidance_scale, n, priority, format,
        webhook, metadata. However often the request must be sent, one job comes of it."""
        key = idempotency_key or str(uuid.uuid4())
        return Job(self, self.say(wire.submit(model, prompts, fields, key, self.patience)))

    def job(self, job_id: str) -> Job:
        """A job by its id; raises ApiError 404 where there is none."""
        return Job(self, self.say(wire.fetch(f"/v1/jobs/{job_id}", self.patience)))

    def get(self, path: str, **params: Any) -> dict[str, Any]:
        """Any other JSON resource, such as `/v1/models`, `/v1/workers` or `/v1/jobs`."""
        return self.say(wire.fetch(path, self.patience, **params))

    def say(self, talk: wire.Conversation[T]) -> T:
        """Carry out one conversation of `wire.py`."""
        try:
            wanted = next(talk)
            while True:
                if isinstance(wanted, wire.Pause):
                    self._pause(wanted.seconds)
                    wanted = talk.send(None)
                    continue
                try:
                    response = self._http.request(**_request(wanted))
                except httpx.TransportError as error:
                    wanted = talk.throw(error)
                else:
                    wanted = talk.send(response)
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
    """The lines of a stream as they come, or None where there is none (204).

    Never tried again: raises ApiError, or httpx's errors when the connection breaks.
    """
    timeout = httpx.Timeout(LONGEST_SILENCE, connect=5)
    with client._http.stream("GET", path, headers=headers, timeout=timeout) as response:
        if response.status_code >= 400:
            response.read()
            raise wire.api_error(response)
        yield None if response.status_code == 204 else wire.lines(response.iter_text())


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
        self._http = httpx.AsyncClient(transport=transport, **_http_settings(server, api_key))

    @property
    def server(self) -> str:
        """The server's address."""
        return str(self._http.base_url).rstrip("/")

    async def submit(
        self, model: str, prompts: Prompts, *, idempotency_key: str | None = None, **fields: Any
    ) -> AsyncJob:
        """As `Client.submit`."""
        key = idempotency_key or str(uuid.uuid4())
        talk = wire.submit(model, prompts, fields, key, self.patience)
        return AsyncJob(self, await self.say(talk))

    async def job(self, job_id: str) -> AsyncJob:
        """A job by its id; raises ApiError 404 where there is none."""
        return AsyncJob(self, await self.say(wire.fetch(f"/v1/jobs/{job_id}", self.patience)))

    async def get(self, path: str, **params: Any) -> dict[str, Any]:
        """Any other JSON resource, such as `/v1/models`, `/v1/workers` or `/v1/jobs`."""
        return await self.say(wire.fetch(path, self.patience, **params))

    async def say(self, talk: wire.Conversation[T]) -> T:
        """Carry out one conversation of `wire.py`."""
        try:
            wanted = next(talk)
            while True:
                if isinstance(wanted, wire.Pause):
                    await self._pause(wanted.seconds)
                    wanted = talk.send(None)
                    continue
                try:
                    response = await self._http.request(**_request(wanted))
                except httpx.TransportError as error:
                    wanted = talk.throw(error)
                else:
                    wanted = talk.send(response)
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


__all__ = ["ApiError", "AsyncClient", "AsyncJob", "Client", "Image", "Job"]
