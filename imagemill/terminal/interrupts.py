"""Handles Ctrl-C as a flag that's checked at safe points instead of an exception anywhere.

The first SIGINT or SIGTERM only sets the flag, so that jobs can be cancelled and files completed.
The second raises KeyboardInterrupt.
"""

import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """The user wants to stop."""


class Interrupts:
    """A context manager that watches for Ctrl-C. Only for the main thread.

    The handler takes no lock, because it may interrupt the code that holds it: an Event that's set
    there can block for good. It writes to a pipe instead, which ends every wait.
    """

    def __init__(self) -> None:
        self._is_asked = False
        self._pipe: tuple[int, int] | None = None
        self._before: dict[int, Any] = {}

    def asked(self) -> bool:
        """Whether the user wants to stop."""
        return self._is_asked

    def pause(self, seconds: float) -> None:
        """Sleep, but raise Interrupted as soon as the user wants to stop."""
        self.rest(seconds)
        if self._is_asked:
            raise Interrupted

    def rest(self, seconds: float) -> None:
        """Sleep, but return early if the user wants to stop."""
        if self._pipe is None:
            time.sleep(seconds)
            return
        wait = select.poll()
        wait.register(self._pipe[0], select.POLLIN)
        wait.poll(seconds * 1000)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_asked:
            raise KeyboardInterrupt
        self._is_asked = True
        if self._pipe is not None:
            os.write(self._pipe[1], b"!")

    def __enter__(self) -> Self:
        self._pipe = os.pipe()
        for number in STOPPING:
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if self._pipe is not None:
            for end in self._pipe:
                os.close(end)
            self._pipe = None


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
