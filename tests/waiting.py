"""Waiting for what another thread or process does, without guessing how long it takes.

No test judges by the clock. The limits here only end a test whose condition can't become true any
more, so they're much longer than the slowest machine needs. tests/house.py refuses shorter ones.
"""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 600.0
"""Seconds for one condition, one answer, or one process to start or end."""

LONG_PATIENCE = 3 * PATIENCE
"""Seconds for a process that works through many cases."""


def wait_until(condition: Callable[[], T]) -> T:
    """Return the condition's first true value; AssertionError if none comes in PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while True:
        began = time.monotonic()
        if value := condition():
            return value
        now = time.monotonic()
        assert now < deadline, f"{condition} did not come true in {PATIENCE} s"
        # At least as long as the check took, so that an expensive check leaves half of the
        # processor to what's being waited for.
        time.sleep(max(0.005, now - began))
