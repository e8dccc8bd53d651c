"""Jobs on a server: `Job` and `AsyncJob` hold the last known state and offer operations on it.

`protocol.py` defines the requests; the client that created the job sends them.
"""

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from imagemill.client import protocol
from imagemill.client.file_names import place_for, write_file
from imagemill.client.models import Image, Progress, counts_of
from jobs.errors import ImagemillError, NotFound
from jobs.job import Counts, State

T = TypeVar("T")

FOREVER = 10 * 365 * 86400.0

OnProgress = Callable[[Progress], object]


class Talker(Protocol):
    """The part of `Client` that `Job` uses."""

    patience: float

    def say(self, talk: protocol.Conversation[T]) -> T:
        """Carry out a conversation with the server."""


class AsyncTalker(Protocol):
    """The part of `AsyncClient` that `AsyncJob` uses."""

    patience: float

    async def say(self, talk: protocol.Conversation[T]) -> T:
        """Carry out a conversation with the server."""


class _Snapshot:
    """A job as last reported by the server; `raw` is the whole response."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.state} {self.progress:.0%}>"

    @property
    def id(self) -> str:
        """The job's id on the server."""
        return str(self.raw["id"])

    @property
    def state(self) -> State:
        """The job's state at the last refresh."""
        return State(self.raw["state"])

    @property
    def counts(self) -> Counts:
        """The number of images in each state."""
        return counts_of(self.raw)

    @property
    def progress(self) -> float:
        """The share of all denoising steps that's done, 0..1."""
        return float(self.raw["progress"])

    def images(self) -> list[Image]:
        """Every image of the job, finished or not, in order."""
        return [Image.parse(raw) for raw in self._raw_images()]

    def _raw_images(self) -> list[dict[str, Any]]:
        if "images" not in self.raw:
            raise ImagemillError(
                f"job {self.id} was listed without its images; call refresh() first"
            )
        images: list[dict[str, Any]] = self.raw["images"]
        return images

    def _succeeded(self) -> list[dict[str, Any]]:
        return [image for image in self._raw_images() if image["state"] == State.SUCCEEDED]

    def _sha256(self, index: int) -> str:
        image = self.images()[index]
        if image.sha256 is None:
            raise NotFound(f"image {index} of job {self.id} is {image.state}")
        return image.sha256


class Job(_Snapshot):
    """A job on the server. Every method except `images` sends requests and updates the state."""

    def __init__(self, client: Talker, raw: dict[str, Any]) -> None:
        super().__init__(raw)
        self._client = client

    def refresh(self) -> Self:
        """Fetch the job's current state."""
        self.raw = self._client.say(
            protocol.fetch(protocol.job_path(self.id), self._client.patience)
        )
        return self

    def wait(self, timeout: float | None = None, on_progress: OnProgress | None = None) -> Self:
        """Block until the job has ended, whatever the outcome.

        Raises TimeoutError after `timeout` seconds. `on_progress` is called with the current
        progress immediately and after every change.
        """
        limit = FOREVER if timeout is None else timeout
        patience = self._client.patience
        talk = protocol.until_finished(self.id, limit, patience, _raw_callback(on_progress))
        self.raw = self._client.say(talk)
        return self

    def download(self, index: int) -> bytes:
        """A finished image's bytes, checksum verified; raises NotFound if it isn't finished."""
        talk = protocol.download(self.id, index, self._sha256(index), self._client.patience)
        return self._client.say(talk)

    def recipe(self, index: int) -> dict[str, Any]:
        """A finished image's recipe: its request, scheduler and versions."""
        path = protocol.job_path(self.id, f"/images/{index}/recipe")
        return self._client.say(protocol.fetch(path, self._client.patience))

    def save(self, folder: str | Path) -> list[Path]:
        """Download every finished image to `folder`, a few at a time, skipping those already there.

        Returns their paths in the images' order.
        """
        target, images = Path(folder), self._succeeded()
        target.mkdir(parents=True, exist_ok=True)
        failed = threading.Event()

        def download_unless_failed(image: Mapping[str, Any]) -> Path:
            if failed.is_set():
                raise CancelledError  # never seen, because `map` raises the earlier error first
            try:
                return fetch_file(self._client, self.raw, image, target)[0]
            except BaseException:
                failed.set()
                raise

        with ThreadPoolExecutor(protocol.DOWNLOADS_AT_ONCE, thread_name_prefix="download") as pool:
            return list(pool.map(download_unless_failed, images))

    def cancel(self) -> Self:
        """Cancel the unfinished images; finished ones are kept."""
        self.raw = self._client.say(protocol.act(self.id, "cancel", self._client.patience))
        return self

    def retry(self) -> Self:
        """Queue the failed and cancelled images again; finished ones are kept."""
        self.raw = self._client.say(protocol.act(self.id, "retry", self._client.patience))
        return self

    def delete(self) -> None:
        """Delete the job and its files from the server."""
        self._client.say(protocol.remove(self.id, self._client.patience))


class AsyncJob(_Snapshot):
    """`Job` for asyncio: the same methods, awaited."""

    def __init__(self, client: AsyncTalker, raw: dict[str, Any]) -> None:
        super().__init__(raw)
        self._client = client

    async def refresh(self) -> Self:
        """Fetch the job's current state."""
        talk = protocol.fetch(protocol.job_path(self.id), self._client.patience)
        self.raw = await self._client.say(talk)
        return self

    async def wait(
        self, timeout: float | None = None, on_progress: OnProgress | None = None
    ) -> Self:
        """Return once the job has ended, whatever the outcome.

        Raises TimeoutError after `timeout` seconds. `on_progress` is called with the current
        progress immediately and after every change.
        """
        limit = FOREVER if timeout is None else timeout
        patience = self._client.patience
        talk = protocol.until_finished(self.id, limit, patience, _raw_callback(on_progress))
        self.raw = await self._client.say(talk)
        return self

    async def download(self, index: int) -> bytes:
        """A finished image's bytes, checksum verified; raises NotFound if it isn't finished."""
        talk = protocol.download(self.id, index, self._sha256(index), self._client.patience)
        return await self._client.say(talk)

    async def recipe(self, index: int) -> dict[str, Any]:
        """A finished image's recipe: its request, scheduler and versions."""
        path = protocol.job_path(self.id, f"/images/{index}/recipe")
        return await self._client.say(protocol.fetch(path, self._client.patience))

    async def save(self, folder: str | Path) -> list[Path]:
        """Download every finished image to `folder`, a few at a time, skipping those already there.

        Returns their paths in the images' order. Files are read and written on other threads.
        """
        target, images = Path(folder), self._succeeded()
        await asyncio.to_thread(target.mkdir, parents=True, exist_ok=True)
        slots = asyncio.Semaphore(protocol.DOWNLOADS_AT_ONCE)
        tasks = [asyncio.create_task(self._fetch(image, target, slots)) for image in images]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _fetch(
        self, image: Mapping[str, Any], folder: Path, slots: asyncio.Semaphore
    ) -> Path:
        async with slots:
            name = folder / protocol.name_of(self.raw, image)
            path, is_there = await asyncio.to_thread(place_for, name, image["sha256"])
            if not is_there:
                patience = self._client.patience
                talk = protocol.download(self.id, image["index"], image["sha256"], patience)
                await asyncio.to_thread(write_file, path, await self._client.say(talk))
            return path

    async def cancel(self) -> Self:
        """Cancel the unfinished images; finished ones are kept."""
        self.raw = await self._client.say(protocol.act(self.id, "cancel", self._client.patience))
        return self

    async def retry(self) -> Self:
        """Queue the failed and cancelled images again; finished ones are kept."""
        self.raw = await self._client.say(protocol.act(self.id, "retry", self._client.patience))
        return self

    async def delete(self) -> None:
        """Delete the job and its files from the server."""
        await self._client.say(protocol.remove(self.id, self._client.patience))


def fetch_file(
    client: Talker, job: Mapping[str, Any], image: Mapping[str, Any], folder: Path
) -> tuple[Path, bool]:
    """Ensure that a finished image is in `folder`; returns its path and whether it's new."""
    path, is_there = place_for(folder / protocol.name_of(job, image), image["sha256"])
    if not is_there:
        talk = protocol.download(job["id"], image["index"], image["sha256"], client.patience)
        write_file(path, client.say(talk))
    return path, not is_there


def _raw_callback(on_progress: OnProgress | None) -> Callable[[dict[str, Any]], object] | None:
    return None if on_progress is None else lambda raw: on_progress(Progress.parse(raw))
