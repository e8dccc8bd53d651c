"""A job's images as they finish, from the server's event stream, on a thread of its own.

A job of 10,000 images is megabytes of JSON; its stream tells each image once. The stream is a
saving and no more: it may end, miss a frame or never begin, and then `lost` says so, and whoever
follows the job asks for all of it again.
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
"""Streams that bring nothing, one after the other, after which it is given up."""

RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Frame:
    """One Server-Sent Event."""

    event: str
    data: str
    id: str


def frames(lines: Iterable[str]) -> Iterator[Frame]:
    """The frames in a stream's lines (WHATWG HTML, 9.2.6); one that is cut off is left out."""
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
    """Reads a job's stream from `start` to the job's end or to `close`."""

    def __init__(self, client: Client, job_id: str) -> None:
        self._client, self._path = client, f"/v1/jobs/{job_id}/events"
        self._images: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._lost = threading.Event()
        self._after = ""
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)

    @property
    def lost(self) -> bool:
        """Whether no more will come, though the job may go on."""
        return self._lost.is_set()

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def take(self) -> list[dict[str, Any]]:
        """The images that finished or failed since the last time, as the server tells them."""
        taken = []
        while not self._images.empty():
            taken.append(self._images.get())
        return taken

    def close(self) -> None:
        """Stop reading; the thread ends with the next line that comes, or with the process."""
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
        """Read one connection; False when another is worth a try, as after a broken one."""
        try:
            return not self._read()
        except ApiError as error:
            return error.status < 500 and error.status != 429
        except (ImagemillError, httpx.HTTPError, RuntimeError, ValueError, KeyError):
            return False

    def _read(self) -> bool:
        """One connection's worth; False when the server says that the job is over."""
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
