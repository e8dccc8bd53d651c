"""Reads a job's finished images from the server's event stream, on a separate thread.

A job of 10,000 images is megabytes of JSON; the stream sends each image only once. It's purely an
optimization: if it ends, skips a frame or never starts, `lost` becomes true and the caller falls
back to fetching the whole job.
"""

import json
import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from imagemill.client.clients import Client, stream_lines
from imagemill.client.errors import ApiError
from jobs.errors import ImagemillError

FAILURES = 3
"""Consecutive connections without any event after which the stream is given up."""

RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Frame:
    """One Server-Sent Event."""

    event: str
    data: str
    id: str


def frames(lines: Iterable[str]) -> Iterator[Frame]:
    """The frames in a stream's lines (WHATWG HTML, 9.2.6); a truncated one is dropped."""
    event, identity = "message", ""
    data: list[str] = []
    for line in lines:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                yield Frame(event, "\n".join(data), identity)
            event, data = "message", []
        elif name == "event":
            event = value
        elif name == "data":
            data.append(value)
        elif name == "id":
            identity = value


class Stream:
    """Reads a job's stream from `start` until the job ends or `close` is called."""

    def __init__(self, client: Client, job_id: str) -> None:
        self._client, self._path = client, f"/v1/jobs/{job_id}/events"
        self._images: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._lost = threading.Event()
        self._after = ""
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)

    @property
    def lost(self) -> bool:
        """Whether no more events will arrive, although the job may still be running."""
        return self._lost.is_set()

    def start(self) -> None:
        """Start reading."""
        self._thread.start()

    def take(self) -> list[dict[str, Any]]:
        """The images that finished or failed since the last call, as sent by the server."""
        images = []
        while not self._images.empty():
            images.append(self._images.get())
        return images

    def close(self) -> None:
        """Stop reading; the thread ends at the next line, or with the process."""
        self._closed.set()

    def _run(self) -> None:
        failures = 0
        while failures < FAILURES and not self._closed.is_set():
            before = self._after
            if self._is_over():
                break
            failures = 0 if self._after != before else failures + 1
            self._closed.wait(RETRY_SECONDS)
        self._lost.set()

    def _is_over(self) -> bool:
        """Read one connection; False if reconnecting makes sense, as after a broken one."""
        try:
            return not self._read()
        except ApiError as error:
            return error.status < 500 and error.status != 429
        except (ImagemillError, httpx.HTTPError, RuntimeError, ValueError, KeyError):
            return False

    def _read(self) -> bool:
        """Read one connection; False if the server says that the job has ended."""
        headers = {"Last-Event-ID": self._after} if self._after else {}
        with stream_lines(self._client, self._path, headers) as lines:
            if lines is None:
                return False
            for frame in frames(lines):
                if self._closed.is_set() or frame.event == "deleted":
                    return False
                if frame.event == "image":
                    self._images.put(json.loads(frame.data))
                self._after = frame.id or self._after
        return True
