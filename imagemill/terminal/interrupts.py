"""Handles Ctrl-C as a flag that's checked at safe points instead of an exception anywhere.

The first SIGINT or SIGTERM only sets the flag, so that jobs can be cancelled and files completed.
The second raises KeyboardInterrupt.
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
    """A context manager that watches for Ctrl-C. Only for the main thread."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._before: dict[int, Any] = {}

    def asked(self) -> bool:
        """Whether the user wants to stop."""
        return self._asked.is_set()

    def pause(self, seconds: float) -> None:
        """Sleep, but raise Interrupted as soon as the user wants to stop."""
        if self._asked.wait(seconds):
            raise Interrupted

    def rest(self, seconds: float) -> None:
        """Sleep, but return early if the user wants to stop."""
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
def signals_blocked() -> Iterator[None]:
    """Block signals in this thread, because a write that a signal interrupts can lose its rest.

    Threads started inside inherit the block for good, which is fine because handlers run in the
    main thread.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
