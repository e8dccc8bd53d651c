"""Ctrl-C as a question that is asked at safe places, not an exception that strikes anywhere.

The first SIGINT or SIGTERM only sets a flag, so that a job can be cancelled and files finished;
the second raises KeyboardInterrupt. Knows nothing of what is interrupted.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """The user wants to stop."""


class Interrupts:
    """Watches for Ctrl-C while it is entered as a context manager; for the main thread."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._before: dict[int, Any] = {}

    def asked(self) -> bool:
        """Whether the user wants to stop."""
        return self._asked.is_set()

    def pause(self, seconds: float) -> None:
        """Sleep; raises Interrupted as soon as the user wants to stop."""
        if self._asked.wait(seconds):
            raise Interrupted

    def rest(self, seconds: float) -> None:
        """Sleep, shorter when the user wants to stop."""
        self._asked.wait(seconds)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked.is_set():
            raise KeyboardInterrupt
        self._asked.set()

    def __enter__(self) -> Self:
        for number in STOPPING:
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)


@contextmanager
def unbroken() -> Iterator[None]:
    """Let this thread's writes be whole: one that a signal cuts short can lose its rest.

    A thread that is started inside is spared for good; the handlers run in the main thread anyway.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
