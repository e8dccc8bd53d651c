"""Waiting for what another thread or process does, without guessing how long it takes."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], seconds: float = 10.0) -> T:
    """Return the condition's first true value; AssertionError when none came in `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{condition} did not come true in {seconds} s"
        time.sleep(0.005)
    return value
