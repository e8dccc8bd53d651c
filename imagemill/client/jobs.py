"""Jobs on a server, `Job` and `AsyncJob`: their last known state, and what can be done with them.

Requests are described in `protocol.py` and carried out by the client that made the job.
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
    """What a `Job` needs of its `Client`."""

    patience: float

    def say(self, talk: protocol.Conversation[T]) -> T:
        """Carry out one conversation with the server."""


class AsyncTalker(Protocol):
    """What an `AsyncJob` needs of its `AsyncClient`."""

    patience: float

    async def say(self, talk: protocol.Conversation[T]) -> T:
        """Carry out one conversation with the server."""


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
        return counts_of(self.raw)

    @property
    def progress(self) -> float:
        """The share of all denoising steps that are done, 0..1."""
        return float(self.raw["progress"])

    def images(self) -> list[Image]:
        """Every image of the job, finished or not, in order."""
        return [Image.parse(raw) for raw in self._listed()]

    def _listed(self) -> list[dict[str, Any]]:
        if "images" not in self.raw:
            raise ImagemillError(f"job {self.id} was listed without its images: refresh() it first")
        images: list[dict[str, Any]] = self.raw["images"]
        return images

    def _made(self) -> list[dict[str, Any]]:
        return [image for image in self._listed() if image["state"] == State.SUCCEEDED]

    def _sha256(self, index: int) -> str:
        image = self.images()[index]
        if image.sha256 is None:
            raise NotFound(f"image {index} of job {self.id} is {image.state}")
        return image.sha256


class Job(_Snapshot):
    """A job on the server; every method but `images` talks to it, and those return fresh news."""

    def __init__(self, client: Talker, raw: dict[str, Any]) -> None:
        super().__init__(raw)
        self._client = client

    def refresh(self) -> Self:
        """Ask how the job is now."""
        self.raw = self._client.say(
            protocol.fetch(protocol.job_path(self.id), self._client.patience)
        )
        return self

    def wait(self, timeout: float | None = None, on_progress: OnProgress | None = None) -> Self:
        """Block until the job has ended, well or not; raises TimeoutError after `timeout` s.

        `on_progress` is called with how the job stands, first and whenever that has changed.
        """
        limit = FOREVER if timeout is None else timeout
        patience = self._client.patience
        talk = protocol.until_finished(self.id, limit, patience, _teller(on_progress))
        self.raw = self._client.say(talk)
        return self

    def download(self, index: int) -> bytes:
        """A finished image's bytes, its checksum verified; raises NotFound before it is made."""
        talk = protocol.download(self.id, index, self._sha256(index), self._client.patience)
        return self._client.say(talk)

    def recipe(self, index: int) -> dict[str, Any]:
        """What a finished image was made of: its request, scheduler, versions."""
        path = protocol.job_path(self.id, f"/images/{index}/recipe")
        return self._client.say(protocol.fetch(path, self._client.patience))

    def save(self, folder: str | Path) -> list[Path]:
        """Put every finished image into `folder`, a few at once, skipping those that are there.

        Returns their paths in the images' order.
        """
        place, made = Path(folder), self._made()
        place.mkdir(parents=True, exist_ok=True)
        over = threading.Event()

        def bring_unless_over(image: Mapping[str, Any]) -> Path:
            if over.is_set():
                raise CancelledError  # which nobody sees: one before it in line has failed
            try:
                return bring(self._client, self.raw, image, place)[0]
            except BaseException:
                over.set()
                raise

        with ThreadPoolExecutor(protocol.DOWNLOADS_AT_ONCE, thread_name_prefix="download") as pool:
            return list(pool.map(bring_unless_over, made))

    def cancel(self) -> Self:
        """Stop what has not finished; what has stays."""
        self.raw = self._client.say(protocol.act(self.id, "cancel", self._client.patience))
        return self

    def retry(self) -> Self:
        """Make again what failed or was cancelled, and only that."""
        self.raw = self._client.say(protocol.act(self.id, "retry", self._client.patience))
        return self

    def delete(self) -> None:
        """Remove the job and its files from the server."""
        self._client.say(protocol.remove(self.id, self._client.patience))


class AsyncJob(_Snapshot):
    """`Job` for asyncio: the same methods, awaited."""

    def __init__(self, client: AsyncTalker, raw: dict[str, Any]) -> None:
        super().__init__(raw)
        self._client = client

    async def refresh(self) -> Self:
        """Ask how the job is now."""
        talk = protocol.fetch(protocol.job_path(self.id), self._client.patience)
        self.raw = await self._client.say(talk)
        return self

    async def wait(
        self, timeout: float | None = None, on_progress: OnProgress | None = None
    ) -> Self:
        """Return once the job has ended, well or not; raises TimeoutError after `timeout` s.

        `on_progress` is called with how the job stands, first and whenever that has changed.
        """
        limit = FOREVER if timeout is None else timeout
        patience = self._client.patience
        talk = protocol.until_finished(self.id, limit, patience, _teller(on_progress))
        self.raw = await self._client.say(talk)
        return self

    async def download(self, index: int) -> bytes:
        """A finished image's bytes, its checksum verified; raises NotFound before it is made."""
        talk = protocol.download(self.id, index, self._sha256(index), self._client.patience)
        return await self._client.say(talk)

    async def recipe(self, index: int) -> dict[str, Any]:
        """What a finished image was made of: its request, scheduler, versions."""
        path = protocol.job_path(self.id, f"/images/{index}/recipe")
        return await self._client.say(protocol.fetch(path, self._client.patience))

    async def save(self, folder: str | Path) -> list[Path]:
        """Put every finished image into `folder`, a few at once, skipping those that are there.

        Returns their paths in the images' order. Files are read and written on other threads.
        """
        place, made = Path(folder), self._made()
        await asyncio.to_thread(place.mkdir, parents=True, exist_ok=True)
        slots = asyncio.Semaphore(protocol.DOWNLOADS_AT_ONCE)
        tasks = [asyncio.create_task(self._bring(image, place, slots)) for image in made]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _bring(
        self, image: Mapping[str, Any], folder: Path, slots: asyncio.Semaphore
    ) -> Path:
        async with slots:
            wanted = folder / protocol.name_of(self.raw, image)
            path, is_there = await asyncio.to_thread(place_for, wanted, image["sha256"])
            if not is_there:
                patience = self._client.patience
                talk = protocol.download(self.id, image["index"], image["sha256"], patience)
                await asyncio.to_thread(write_file, path, await self._client.say(talk))
            return path

    async def cancel(self) -> Self:
        """Stop what has not finished; what has stays."""
        self.raw = await self._client.say(protocol.act(self.id, "cancel", self._client.patience))
        return self

    async def retry(self) -> Self:
        """Make again what failed or was cancelled, and only that."""
        self.raw = await self._client.say(protocol.act(self.id, "retry", self._client.patience))
        return self

    async def delete(self) -> None:
        """Remove the job and its files from the server."""
        await self._client.say(protocol.remove(self.id, self._client.patience))


def bring(
    client: Talker, job: Mapping[str, Any], image: Mapping[str, Any], folder: Path
) -> tuple[Path, bool]:
    """The file of a finished image in `folder`, and whether it had to be downloaded."""
    path, is_there = place_for(folder / protocol.name_of(job, image), image["sha256"])
    if not is_there:
        talk = protocol.download(job["id"], image["index"], image["sha256"], client.patience)
        write_file(path, client.say(talk))
    return path, not is_there


def _teller(on_progress: OnProgress | None) -> Callable[[dict[str, Any]], object] | None:
    return None if on_progress is None else lambda raw: on_progress(Progress.parse(raw))
